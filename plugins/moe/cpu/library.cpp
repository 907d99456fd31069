// ONNX Runtime's side: the operators gatework::PackedMoE, PackedMatMul and CachedAttention, version 1. ../cpu_ops.py describes
// their inputs and attributes.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <string>

#include "attention.h"
#include "moe.h"
#include "ort_api.h"

namespace gatework {
namespace {

ort::Api api;

struct Failure {
  int code;
  std::string message;
};

// Results of the runtime's own calls.
void check(ort::Status* status) {
  if (status) throw status;
}

template <class Work>
ort::Status* guarded(Work&& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (ort::Status* status) {
    return status;
  } catch (const Failure& failure) {
    return api.create_status(failure.code, failure.message.c_str());
  } catch (const std::exception& error) {
    return api.create_status(ort::kFail, error.what());
  }
}

class PoolThreads final : public Threads {
 public:
  explicit PoolThreads(const ort::KernelContext* context) : context_(context) {}
  void run(void (*fn)(void*, size_t), size_t count, void* data) const override {
    check(api.parallel_for(context_, fn, count, 0, data));
  }

 private:
  const ort::KernelContext* context_;
};

class Attributes {
 public:
  explicit Attributes(const ort::KernelInfo* info) : info_(info) {}

  int integer(const char* name, int64_t least, int64_t most) const {
    int64_t value = 0;
    check(api.int_attribute(info_, name, &value));
    if (value < least || value > most)
      throw Failure{ort::kInvalidArgument, std::string("attribute ") + name + " is out of range: " + std::to_string(value)};
    return int(value);
  }

  float real(const char* name) const {
    float value = 0;
    check(api.float_attribute(info_, name, &value));
    return value;
  }

  // Of graphs that may be older than the attribute.
  float real(const char* name, float otherwise) const {
    float value = otherwise;
    if (ort::Status* status = api.float_attribute(info_, name, &value)) {
      api.release_status(status);
      return otherwise;
    }
    return value;
  }

  // Of the norm that a node may begin with.
  Norm norm() const { return {nullptr, real("epsilon", 0.0f), real("centred", 0.0f) != 0.0f}; }

  // The place of a string attribute among `known`.
  int choice(const char* name, std::initializer_list<const char*> known) const {
    char text[32] = "";
    size_t size = sizeof text;
    check(api.string_attribute(info_, name, text, &size));
    int place = 0;
    for (const char* candidate : known) {
      if (!std::strcmp(text, candidate)) return place;
      ++place;
    }
    throw Failure{ort::kInvalidArgument, std::string("unknown ") + name + ": " + text};
  }

  Columns columns(const char* name, bool wide = false) const {
    Columns k{integer(name, 1, 1 << 24), integer("group_size", 16, 1 << 16), integer("bits", 4, 8), wide};
    if ((k.bits != 4 && k.bits != 8) || k.group % 16)
      throw Failure{ort::kInvalidArgument, "bits must be 4 or 8, and group_size a multiple of 16"};
    return k;
  }

 private:
  const ort::KernelInfo* info_;
};

struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> shape;

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t dimension : shape) product *= dimension;
    return product;
  }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

Tensor input(const ort::KernelContext* context, size_t index) {
  Tensor tensor;
  const ort::Value* value = nullptr;
  check(api.input(context, index, &value));
  if (!value) return tensor;
  check(api.tensor_data(const_cast<ort::Value*>(value), &tensor.data));
  ort::TensorInfo* info = nullptr;
  check(api.tensor_info(value, &info));
  size_t rank = 0;
  ort::Status* status = api.dimension_count(info, &rank);
  tensor.shape.resize(rank);
  if (!status) status = api.dimensions(info, tensor.shape.data(), rank);
  api.release_tensor_info(info);
  check(status);
  return tensor;
}

template <class T = float>
T* output(ort::KernelContext* context, const std::vector<int64_t>& shape, size_t index = 0) {
  ort::Value* value = nullptr;
  check(api.output(context, index, shape.data(), shape.size(), &value));
  if (!value) throw Failure{ort::kInvalidArgument, "output " + std::to_string(index) + " is missing"};
  void* data = nullptr;
  check(api.tensor_data(value, &data));
  return static_cast<T*>(data);
}

// A wrong size would make the kernels read beyond a tensor.
void expect_count(const char* name, const Tensor& tensor, int64_t count) {
  if (!tensor.data && count)
    throw Failure{ort::kInvalidArgument, std::string("input ") + name + " is missing"};
  if (tensor.count() != count)
    throw Failure{ort::kInvalidArgument, std::string("input ") + name + " has " + std::to_string(tensor.count()) +
                                             " elements, expected " + std::to_string(count)};
}

// x [..., columns], its norm and what is added to it before; the sum becomes the node's second output.
Stream stream(ort::KernelContext* context, const Tensor& x, int columns, Norm norm, const Tensor& gamma, const Tensor& skip) {
  if (x.shape.empty() || x.shape.back() != columns)
    throw Failure{ort::kInvalidArgument, "the last dimension of x is not " + std::to_string(columns)};
  Stream rows{x.as<float>()};
  if (gamma.data) {
    expect_count("gamma", gamma, columns);
    norm.gamma = gamma.as<float>();
    rows.norm = norm;
  }
  if (!skip.shape.empty()) {
    expect_count("skip", skip, x.count());
    rows.skip = skip.as<float>();
    rows.sum = output(context, x.shape, 1);
  }
  return rows;
}

Matrix matrix(const char* name, const Columns& k, int64_t blocks, const Tensor& codes, const Tensor& scales) {
  expect_count(name, codes, blocks * int64_t(k.block_bytes()));
  expect_count((std::string(name) + "_scale").c_str(), scales, blocks * int64_t(k.block_scales()));
  return {codes.as<uint8_t>(), scales.as<uint16_t>()};
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose_kernels();
  if (!chosen)
    throw Failure{ort::kInvalidArgument, std::string("GATEWORK_CPU_PATH names no kernels of this machine: ") +
                                             std::getenv("GATEWORK_CPU_PATH")};
  return *chosen;
}

struct MatMulKernel {
  static constexpr const char* kName = "PackedMatMul";
  static constexpr int kTypes[] = {ort::kFloat, ort::kUint8, ort::kBfloat16, ort::kFloat, ort::kFloat};
  static constexpr bool required(size_t input) { return input < 3; }
  static constexpr size_t kRequiredOutputs = 1, kOutputs = 2;
  static constexpr int output_type(size_t) { return ort::kFloat; }

  const Kernels& path = kernels();
  Columns k;
  int rows;
  Norm norm;

  explicit MatMulKernel(const Attributes& attributes)
      : k(attributes.columns("K", attributes.integer("wide", 0, 1))),
        rows(attributes.integer("N", 1, 1 << 24)),
        norm(attributes.norm()) {}

  void compute(ort::KernelContext* context) const {
    const Tensor x = input(context, 0);
    const Stream numbers = stream(context, x, k.count, norm, input(context, 3), input(context, 4));
    const Matrix w = matrix("w", k, ceil_div(rows, kRows), input(context, 1), input(context, 2));
    std::vector<int64_t> shape = x.shape;
    shape.back() = rows;
    const int tokens = int(x.count() / k.count);
    float* y = output(context, shape);
    static thread_local Tokens kept;
    Tokens& quantised = kept;
    const PoolThreads threads(context);
    quantised.quantize(path, k, numbers, tokens, threads);
    multiply(path, k, w, rows, quantised, tokens, y, threads);
  }
};

struct MoEKernel {
  static constexpr const char* kName = "PackedMoE";
  static constexpr int kTypes[] = {ort::kFloat,    ort::kFloat, ort::kUint8, ort::kBfloat16,
                                   ort::kUint8, ort::kBfloat16, ort::kFloat, ort::kFloat,
                                   ort::kFloat, ort::kFloat,    ort::kFloat};
  static constexpr bool required(size_t input) { return input == 0 || (input >= 2 && input < 6); }
  static constexpr size_t kRequiredOutputs = 1, kOutputs = 3;
  static constexpr int output_type(size_t) { return ort::kFloat; }

  const Kernels& path = kernels();
  MoE moe;
  Norm norm;

  explicit MoEKernel(const Attributes& attributes) {
    moe.in = attributes.columns("hidden_size");
    moe.out = attributes.columns("expert_width", true);
    moe.glu = Glu(attributes.choice("glu", {"none", "two_way", "three_way"}) + 1);
    moe.activation = Activation(attributes.choice("activation", {"silu", "gelu", "gelu_tanh", "relu"}));
    moe.gate = {attributes.real("alpha", 1.0f), attributes.real("beta", 0.0f), attributes.real("limit", 0.0f)};
    if (!moe.gate.plain() && (moe.glu != Glu::two_way || moe.activation != Activation::silu))
      throw Failure{ort::kInvalidArgument, "alpha, beta and limit are of two_way silu gates"};
    if (!(moe.gate.alpha >= 0.0f && moe.gate.beta >= 0.0f && moe.gate.limit >= 0.0f))
      throw Failure{ort::kInvalidArgument, "attribute alpha, beta or limit is out of range"};
    Router& router = moe.router;
    router.experts = attributes.integer("num_experts", 1, 1 << 16);
    router.top_k = attributes.integer("top_k", 1, router.experts);
    router.scoring = Scoring(attributes.choice("scoring", {"softmax", "sigmoid"}));
    router.renormalize = attributes.integer("renormalize", 0, 1);
    router.capacity_factor = attributes.real("capacity_factor");
    router.min_capacity = attributes.integer("min_capacity", 0, 1 << 30);
    norm = attributes.norm();
  }

  void compute(ort::KernelContext* context) const {
    const Tensor x = input(context, 0), given = input(context, 1), b_in = input(context, 6), b_out = input(context, 7);
    const Tensor router = input(context, 8);
    const int64_t D = moe.in.count, I = moe.out.count, E = moe.router.experts, T = x.count() / D;
    const Stream numbers = stream(context, x, moe.in.count, norm, input(context, 9), input(context, 10));
    float* logits = static_cast<float*>(given.data);
    if (router.data) {
      expect_count("router", router, E * D);
      logits = output(context, {T, E}, 2);
    } else {
      expect_count("router_logits", given, T * E);
    }
    Experts experts;
    const int64_t in_blocks = E * moe.matrices() * ceil_div(int(I), kRows);
    experts.w_in = matrix("w_in", moe.in, in_blocks, input(context, 2), input(context, 3));
    experts.w_out = matrix("w_out", moe.out, E * ceil_div(int(D), kRows), input(context, 4), input(context, 5));
    if (b_in.data) expect_count("b_in", b_in, E * moe.matrices() * I);
    if (b_out.data) expect_count("b_out", b_out, E * D);
    experts.b_in = b_in.as<float>();
    experts.b_out = b_out.as<float>();
    float* y = output(context, x.shape);
    run_moe(path, moe, experts, numbers, router.as<float>(), logits, int(T), y, PoolThreads(context));
  }
};

struct AttentionKernel {
  static constexpr const char* kName = "CachedAttention";
  static constexpr int kTypes[] = {ort::kFloat, ort::kFloat16, ort::kFloat16, ort::kInt64,
                                   ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr bool required(size_t input) { return input < 6; }
  static constexpr size_t kRequiredOutputs = 3, kOutputs = 3;
  static constexpr int output_type(size_t output) { return output == 0 ? ort::kFloat : ort::kFloat16; }

  const Kernels& path = kernels();
  Attention attention;

  explicit AttentionKernel(const Attributes& attributes) {
    attention.heads = attributes.integer("num_heads", 1, 1 << 16);
    attention.kv_heads = attributes.integer("kv_num_heads", 1, 1 << 16);
    attention.scale = attributes.real("scale");
    attention.softcap = attributes.real("softcap");
    attention.window = attributes.integer("window", 0, 1 << 30);
    if (attention.heads % attention.kv_heads || attention.heads / attention.kv_heads > kMaxRows)
      throw Failure{ort::kInvalidArgument, "num_heads is not a multiple, at most 128 times, of kv_num_heads"};
  }

  void compute(ort::KernelContext* context) const {
    const Tensor q = input(context, 0), past_k = input(context, 1), past_v = input(context, 2), starts = input(context, 3);
    const Tensor cos = input(context, 4), sin = input(context, 5), k = input(context, 6), v = input(context, 7);
    if (q.shape.size() != 3 || past_k.shape.size() != 4 || cos.shape.size() != 2)
      throw Failure{ort::kInvalidArgument, "expected q [B, S, width], past_k [B, heads, slots, width] and cos [slots, half]"};
    const Tensor slopes = input(context, 8), sinks = input(context, 9);
    Attention sized = attention;
    const int64_t B = q.shape[0], S = q.shape[1], slots = past_k.shape[2], kv_heads = attention.kv_heads;
    const int64_t width = past_k.shape[3], half = cos.shape[1], kv_width = kv_heads * width;
    const int64_t q_width = attention.heads * width;
    if (width % 16 || 2 * half > width || slots > (1 << 24))
      throw Failure{ort::kInvalidArgument, "heads are no multiple of 16 wide, or narrower than their rotation, or slots too many"};
    sized.width = int(width);
    sized.rotary = int(2 * half);
    expect_count("past_k", past_k, B * kv_heads * slots * width);
    expect_count("past_v", past_v, past_k.count());
    expect_count("cos", cos, slots * half);
    expect_count("sin", sin, slots * half);
    expect_count("write_indices", starts, B);
    if (slopes.data) expect_count("slopes", slopes, attention.heads);
    sized.slopes = slopes.as<float>();
    if (sinks.data) expect_count("sinks", sinks, attention.heads);
    sized.sinks = sinks.as<float>();
    for (int64_t b = 0; b < B; ++b)
      if (starts.as<int64_t>()[b] < 0 || starts.as<int64_t>()[b] > slots - S)
        throw Failure{ort::kInvalidArgument, "write_indices are outside the cache"};
    Projected x{q.as<float>(), k.as<float>(), v.as<float>(), size_t(q_width), size_t(kv_width), size_t(kv_width)};
    if (k.data) {
      expect_count("q", q, B * S * q_width);
      expect_count("k", k, B * S * kv_width);
      expect_count("v", v, B * S * kv_width);
    } else {
      x.q_stride = x.k_stride = x.v_stride = size_t(q_width + 2 * kv_width);
      x.k = x.q + q_width;
      x.v = x.k + kv_width;
      expect_count("q", q, B * S * int64_t(x.q_stride));
    }
    const KVCache cache{present(context, 1, past_k), present(context, 2, past_v), cos.as<float>(), sin.as<float>(), int(slots)};
    float* y = output(context, {B, S, q_width});
    run_attention(path, sized, x, cache, starts.as<int64_t>(), int(B), int(S), y, PoolThreads(context));
  }

 private:
  // The updated cache, which a caller binds to the memory of the past one.
  static Half* present(ort::KernelContext* context, size_t index, const Tensor& past) {
    Half* data = output<Half>(context, past.shape, index);
    if (data != past.data) std::memcpy(data, past.data, size_t(past.count()) * sizeof(Half));
    return data;
  }
};

template <class Kernel>
ort::CustomOp operator_of() {
  ort::CustomOp op{};
  op.version = ort::kVersion;
  op.name = [](const ort::CustomOp*) { return Kernel::kName; };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.input_type = [](const ort::CustomOp*, size_t index) { return Kernel::kTypes[index]; };
  op.input_count = [](const ort::CustomOp*) { return std::size(Kernel::kTypes); };
  op.input_characteristic = [](const ort::CustomOp*, size_t index) -> int {
    return Kernel::required(index) ? ort::kRequired : ort::kOptional;
  };
  op.output_type = [](const ort::CustomOp*, size_t index) { return Kernel::output_type(index); };
  op.output_count = [](const ort::CustomOp*) { return Kernel::kOutputs; };
  op.output_characteristic = [](const ort::CustomOp*, size_t index) -> int {
    return index < Kernel::kRequiredOutputs ? ort::kRequired : ort::kOptional;
  };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };  // where the provider's tensors are
  op.start_version = op.end_version = [](const ort::CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const ort::CustomOp*, const void*, const ort::KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Kernel(Attributes(info)); });
  };
  op.compute_v2 = [](void* kernel, ort::KernelContext* context) {
    return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace
}  // namespace gatework

#if defined(_WIN32)
#define GATEWORK_EXPORT __declspec(dllexport)
#else
#define GATEWORK_EXPORT __attribute__((visibility("default")))
#endif

// What ONNX Runtime calls when a session registers this library.
extern "C" GATEWORK_EXPORT gatework::ort::Status* RegisterCustomOps(gatework::ort::SessionOptions* options,
                                                                    const gatework::ort::ApiBase* base) {
  using namespace gatework;
  api.entries = base->get_api(ort::kVersion);  // never null here: the package asks for an ONNX Runtime that has it
  return guarded([&] {
    static const ort::CustomOp operators[] = {operator_of<MatMulKernel>(), operator_of<MoEKernel>(),
                                              operator_of<AttentionKernel>()};
    static ort::CustomOpDomain* domain = nullptr;  // lives as long as the process, like the sessions that may refer to it
    if (!domain) {
      check(api.create_domain("gatework", &domain));
      for (const ort::CustomOp& op : operators) check(api.add_operator(domain, &op));
    }
    check(api.add_domain(options, domain));
  });
}

// The name of the kernels in use, or nullptr if GATEWORK_CPU_PATH names none that this machine can run.
extern "C" GATEWORK_EXPORT const char* gatework_cpu_path() {
  const gatework::Kernels* const chosen = gatework::choose_kernels();
  return chosen ? chosen->name : nullptr;
}
