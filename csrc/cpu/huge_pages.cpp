#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace wrpo {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
bool advise_huge_pages(void* start, int64_t bytes) {
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + uintptr_t(bytes)) / page * page;
  return bytes > 0 && first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
}
#else
bool advise_huge_pages(void*, int64_t) { return false; }
#endif

}  // namespace wrpo
