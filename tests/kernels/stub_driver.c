/* A CUDA driver without a GPU: what Triton's launcher calls of libcuda.so.1, noted instead of done.

   Addresses are those of the host. What a kernel is (its parameters and registers) is read from its cubin by
   stub_driver.py, which announces it by stub_announce before Triton loads the binary.

   Compiled against the cuda.h that Triton carries, so that every call is the one Triton was compiled for. */

#include "cuda.h"
#include <stdlib.h>
#include <string.h>

typedef struct {
  int parameters, *size, *offset, bytes, registers;
} Kernel;

typedef struct {
  uint64_t kernel, stream;
  uint32_t grid[3], block[3], shared, attributes;
  unsigned char parameters[]; /* laid out as in the GPU's constant bank */
} Launch;

static Kernel *announced;
static Launch **launches;
static int count;

void stub_announce(int parameters, const int *size, const int *offset, int registers) {
  size_t ints = parameters * sizeof(int);
  announced = malloc(sizeof(Kernel));
  *announced = (Kernel){parameters, memcpy(malloc(ints), size, ints), memcpy(malloc(ints), offset, ints), 0,
                        registers};
  for (int i = 0; i < parameters; i++)
    if (offset[i] + size[i] > announced->bytes)
      announced->bytes = offset[i] + size[i];
}

int stub_count(void) { return count; }
const Launch *stub_launch(int index) { return launches[index]; }

/* ------------------------------------------------------------------------------------------- launching */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  Kernel *kernel = (Kernel *)f;
  Launch *launch = calloc(1, sizeof(Launch) + kernel->bytes);
  if (extra != NULL)
    return CUDA_ERROR_INVALID_VALUE;
  launch->kernel = (uint64_t)f;
  launch->stream = (uint64_t)config->hStream;
  launch->grid[0] = config->gridDimX, launch->grid[1] = config->gridDimY, launch->grid[2] = config->gridDimZ;
  launch->block[0] = config->blockDimX, launch->block[1] = config->blockDimY;
  launch->block[2] = config->blockDimZ;
  launch->shared = config->sharedMemBytes;
  launch->attributes = config->numAttrs;
  for (int i = 0; i < kernel->parameters; i++)
    memcpy(launch->parameters + kernel->offset[i], parameters[i], kernel->size[i]);
  launches = realloc(launches, (count + 1) * sizeof(Launch *));
  launches[count++] = launch;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_NOT_SUPPORTED;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

/* ------------------------------------------------------------------------------------- loading a kernel */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)announced;
  return announced == NULL ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  Kernel *kernel = (Kernel *)function;
  int of_a_warp = (kernel->registers + 7) / 8 * 8 * 32;
  int threads = 65536 / of_a_warp * 32;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = threads < 1024 ? threads : 1024; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
  default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* ---------------------------------------------------------------------------------------------- devices */

static CUcontext current;

/* Not called by Triton's launcher; a build of PyTorch with CUDA is told that there is no GPU for it. */
CUresult cuInit(unsigned int flags) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)(uintptr_t)(device + 1), CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) { /* an H100's */
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  return *text = "refused by the stub driver", CUDA_SUCCESS;
}
