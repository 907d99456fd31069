// The few entries of ONNX Runtime's C API that a custom operator uses, declared by hand because its packages ship no header.
// The API is a table of function pointers to which entries are only ever appended; places are those of onnxruntime_c_api.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gatework::ort {

constexpr uint32_t kVersion = 17;  // the first with KernelContext_ParallelFor, the newest entry used here

struct Status {};  // opaque, like those below
struct SessionOptions;
struct CustomOp;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;

enum ElementType { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
enum Characteristic { kRequired = 0, kOptional = 1 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

struct Api {
  const void* const* entries;

  template <class Function>
  Function* at(int place) const {
    return reinterpret_cast<Function*>(const_cast<void*>(entries[place]));
  }

#define GATEWORK_ORT_ENTRY(place, result, name, ...) \
  template <class... Arguments>                      \
  result name(Arguments... arguments) const {        \
    return at<result(__VA_ARGS__)>(place)(arguments...); \
  }
  GATEWORK_ORT_ENTRY(0, Status*, create_status, int code, const char* message)
  GATEWORK_ORT_ENTRY(26, Status*, create_domain, const char* name, CustomOpDomain**)
  GATEWORK_ORT_ENTRY(27, Status*, add_operator, CustomOpDomain*, const CustomOp*)
  GATEWORK_ORT_ENTRY(28, Status*, add_domain, SessionOptions*, CustomOpDomain*)
  GATEWORK_ORT_ENTRY(51, Status*, tensor_data, Value*, void**)
  GATEWORK_ORT_ENTRY(61, Status*, dimension_count, const TensorInfo*, size_t*)
  GATEWORK_ORT_ENTRY(62, Status*, dimensions, const TensorInfo*, int64_t*, size_t)
  GATEWORK_ORT_ENTRY(65, Status*, tensor_info, const Value*, TensorInfo**)
  GATEWORK_ORT_ENTRY(85, Status*, float_attribute, const KernelInfo*, const char* name, float*)
  GATEWORK_ORT_ENTRY(86, Status*, int_attribute, const KernelInfo*, const char* name, int64_t*)
  GATEWORK_ORT_ENTRY(87, Status*, string_attribute, const KernelInfo*, const char* name, char*, size_t*)
  GATEWORK_ORT_ENTRY(90, Status*, input, const KernelContext*, size_t, const Value**)
  GATEWORK_ORT_ENTRY(91, Status*, output, KernelContext*, size_t, const int64_t*, size_t, Value**)
  GATEWORK_ORT_ENTRY(93, void, release_status, Status*)
  GATEWORK_ORT_ENTRY(99, void, release_tensor_info, TensorInfo*)
  GATEWORK_ORT_ENTRY(274, Status*, parallel_for, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)
#undef GATEWORK_ORT_ENTRY
};

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};

// An operator: its schema and its callbacks, up to the fields of version 17.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_minimum)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_minimum)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* api, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
};

}  // namespace gatework::ort
