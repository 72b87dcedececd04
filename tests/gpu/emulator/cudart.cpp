// The part of the CUDA runtime that host code compiled by nvcc calls: no device, every launch goes to a callback.
//
// Errors behave as in CUDA: a failed launch is kept until cudaGetLastError takes it.
#include <cstddef>
#include <map>
#include <string>

struct dim3 {
  unsigned x, y, z;
};

using Callback = int (*)(const char* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream);

static Callback on_launch = nullptr;
static int last_error = 0;
static std::map<const void*, std::string> names;
static struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;

extern "C" {

void emulator_on_launch(Callback callback) { on_launch = callback; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return 0;
}

int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  const int error = on_launch(names.at(function).c_str(), grid, block, arguments, shared, stream);
  if (error) last_error = error;
  return error;
}
// CUDA 13 looks the kernel up first.
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// One device, number 0; another one is cudaErrorInvalidDevice.
int cudaSetDevice(int device) {
  if (device != 0) last_error = 101;
  return device == 0 ? 0 : 101;
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int error) {
  return error == 101 ? "invalid device ordinal" : error == 1 ? "invalid argument" : "unspecified launch failure";
}

}  // extern "C"
