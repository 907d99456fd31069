// Which kernels run: the first that the machine supports, or the one that GATEWORK_CPU_PATH names.
#include <cstdlib>
#include <cstring>

#include "layout.h"

namespace gatework {

extern const Kernels kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kNeon;

static const Kernels* const kPaths[] = {
#if defined(GATEWORK_X86)
    &kAvx512Vnni, &kAvxVnni, &kAvx2,
#endif
#if defined(GATEWORK_ARM)
    &kNeon,
#endif
    &kPortable,
};

const Kernels* choose_kernels() {
  const char* wanted = std::getenv("GATEWORK_CPU_PATH");
  for (const Kernels* kernels : kPaths) {
    if (wanted && *wanted && std::strcmp(wanted, kernels->name) != 0) continue;
    if (kernels->supported()) return kernels;
  }
  return nullptr;
}

}  // namespace gatework
