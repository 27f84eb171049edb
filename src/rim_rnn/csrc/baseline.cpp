// What every processor of the architecture has: 16-byte vectors (SSE2, NEON).
#define RIM_ISA baseline
#define RIM_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RIM_TILE_ROWS 8
#define RIM_TILE_VECTORS 3
#else
#define RIM_TILE_ROWS 6
#define RIM_TILE_VECTORS 2
#endif
#include "kernels.h"
