// A stand-in for CUDA's runtime, driver and cuBLAS on a machine without a GPU.
//
// PyTorch's host code runs on it as on one H100: dispatch, autocast, caching allocator, stream
// capture, CUDA graphs, optimizers. Kernels do nothing: results are zeros or old memory.
// - It logs launches, copies, waits of the host and captures: `standin_log`.
// - It forbids what CUDA forbids while a stream is captured. It then logs a line with "BAD" and lets
//   the capture end in error 901, as CUDA does.
// - It counts allocated memory: cudaMemGetInfo.
//
// It is preloaded before the real libraries. A function that it lacks is found in those and fails, as
// it does without a GPU. Not covered: cuDNN (device.py replaces it by shapes and layouts), NCCL,
// DALI, several devices.
//
// Source: the CUDA runtime's reference, "Stream Management" and "Graph Management".

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

#define API extern "C" __attribute__((visibility("default")))
#undef cudaGetDeviceProperties

namespace {

constexpr size_t MEMORY = 80ull << 30;
constexpr cudaError_t OK = cudaSuccess;

struct Stream { unsigned long long capture; bool invalid; };  // number of its capture; 0: none
struct Event { unsigned long long capture; };  // number of the capture that recorded it; 0: none
struct Graph { int nodes; };
struct Shape { dim3 grid, block; size_t shared; cudaStream_t stream; };

std::recursive_mutex lock;
#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock)

// These are never destroyed: threads use them after the end of main.
auto& memory = *new std::map<char*, size_t>;
auto& names = *new std::unordered_map<const void*, std::string>;  // of kernels
auto& lines = *new std::string;
size_t taken = 0;
unsigned long long captures = 0;   // begun so far
Stream* capturing = nullptr;       // the stream of the current capture: one at a time
int nodes = 0;                     // in the graph of the current capture
thread_local bool strict = false;  // this thread began a capture that forbids unsafe calls
thread_local int mode = cudaStreamCaptureModeGlobal;
thread_local Shape shape;

void note(const std::string& line) { LOCKED; lines += line + '\n'; }

// The calls themselves return the errors, so cudaGetLastError never has one.
cudaError_t bad(const std::string& what) {
  LOCKED;
  if (capturing) capturing->invalid = true;
  note("BAD " + what);
  return cudaErrorStreamCaptureUnsupported;
}

bool forbidden() { return strict && mode != cudaStreamCaptureModeRelaxed; }

Stream* captured(cudaStream_t stream) {
  Stream* found = reinterpret_cast<Stream*>(stream);
  // The handles of the default streams are small numbers, not addresses.
  return reinterpret_cast<uintptr_t>(stream) > 4096 && found->capture ? found : nullptr;
}

// Logs a kernel, copy or fill. If the stream is captured, it becomes a node of the graph.
void launch(const std::string& what, cudaStream_t stream) {
  LOCKED;
  if (captured(stream)) nodes++;
  note((captured(stream) ? "captured " : capturing ? "beside " : "launch ") + what);
}

bool on_device(const void* pointer) {
  LOCKED;
  auto next = memory.upper_bound((char*)pointer);
  if (next == memory.begin()) return false;
  auto [start, size] = *--next;
  return pointer < start + size;
}

std::string direction(const void* to, const void* from) {
  return std::string(on_device(from) ? "device" : "host") + " to " + (on_device(to) ? "device" : "host");
}

// The device attributes that PyTorch and Triton read, with the values of an H100.
int attribute(int number) {
  switch (number) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return 9;
  }
  return 0;
}

int nothing(...) { return 0; }

int primary_state(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// For the tests
// ------------------------------------------------------------------------------------------------

// The lines logged since the last call. The string is valid until the next call.
API const char* standin_log() {
  static std::string last;
  LOCKED;
  last.swap(lines);
  lines.clear();
  return last.c_str();
}

// Adds a caller's line to the log.
API void standin_note(const char* line) { note(line); }

// ------------------------------------------------------------------------------------------------
// Device and errors
// ------------------------------------------------------------------------------------------------

API cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return OK; }
API cudaError_t cudaGetDevice(int* device) { *device = 0; return OK; }
API cudaError_t cudaSetDevice(int) { return OK; }
API cudaError_t cudaGetLastError() { return OK; }
API cudaError_t cudaPeekAtLastError() { return OK; }
API cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return OK; }
API cudaError_t cudaRuntimeGetVersion(int* version) { *version = 13000; return OK; }
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int) { *value = attribute(a); return OK; }

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "stand-in for an H100");
  found->totalGlobalMem = MEMORY;
  found->major = 9;
  found->warpSize = 32;
  found->multiProcessorCount = 132;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->l2CacheSize = 50 << 20;
  return OK;
}

// ------------------------------------------------------------------------------------------------
// Memory
// ------------------------------------------------------------------------------------------------

API cudaError_t cudaMalloc(void** found, size_t size) {
  if (forbidden()) return bad("cudaMalloc");
  size = (size + 4095) & ~4095ull;
  LOCKED;
  if (taken + size > MEMORY) return cudaErrorMemoryAllocation;
  *found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*found == MAP_FAILED) return cudaErrorMemoryAllocation;
  memory[(char*)*found] = size;
  taken += size;
  return OK;
}

API cudaError_t cudaFree(void* pointer) {
  if (forbidden()) return bad("cudaFree");
  LOCKED;
  auto found = memory.find((char*)pointer);
  if (found == memory.end()) return OK;
  munmap(pointer, found->second);
  taken -= found->second;
  memory.erase(found);
  return OK;
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  LOCKED;
  *free = MEMORY - taken;
  *total = MEMORY;
  return OK;
}

API cudaError_t cudaHostAlloc(void** found, size_t size, unsigned) {
  if (forbidden()) return bad("cudaHostAlloc");
  *found = aligned_alloc(4096, (size + 4095) & ~4095ull);
  return OK;
}

API cudaError_t cudaFreeHost(void* pointer) { free(pointer); return OK; }

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  memset(found, 0, sizeof *found);
  found->type = on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return OK;
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  std::string way = direction(to, from);
  launch("copy " + way, stream);
  // A replay would read the host's memory as it is at that later time.
  if (captured(stream) && way != "device to device") return bad("copy " + way);
  memcpy(to, from, size);
  return OK;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  note("WAIT cudaMemcpy " + direction(to, from));
  if (capturing) return bad("cudaMemcpy");
  memcpy(to, from, size);
  return OK;
}

API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  launch("fill", stream);
  memset(to, value, size);
  return OK;
}

// ------------------------------------------------------------------------------------------------
// Streams and events
// ------------------------------------------------------------------------------------------------

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* found, unsigned, int) {
  *found = reinterpret_cast<cudaStream_t>(new Stream{0, false});
  return OK;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return OK; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return OK; }
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return captured(stream) ? bad("cudaStreamQuery") : OK; }

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  note("WAIT cudaStreamSynchronize");
  return captured(stream) ? bad("cudaStreamSynchronize") : OK;
}

// The real call would wait for the captured stream too, in any thread.
API cudaError_t cudaDeviceSynchronize() {
  note("WAIT cudaDeviceSynchronize");
  return capturing ? bad("cudaDeviceSynchronize") : OK;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* found, unsigned) {
  *found = reinterpret_cast<cudaEvent_t>(new Event{0});
  return OK;
}

API cudaError_t cudaEventCreate(cudaEvent_t* found) { return cudaEventCreateWithFlags(found, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { delete reinterpret_cast<Event*>(event); return OK; }

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Stream* source = captured(stream);
  reinterpret_cast<Event*>(event)->capture = source ? source->capture : 0;
  return OK;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  unsigned long long capture = reinterpret_cast<Event*>(event)->capture;
  if (captured(stream) && !capture) return bad("cudaStreamWaitEvent for what is not captured");
  if (!captured(stream) && capturing && capture == capturing->capture)
    return bad("cudaStreamWaitEvent of another stream for what is captured");
  return OK;
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
  return forbidden() || reinterpret_cast<Event*>(event)->capture ? bad("cudaEventQuery") : OK;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  note("WAIT cudaEventSynchronize");
  return forbidden() || reinterpret_cast<Event*>(event)->capture ? bad("cudaEventSynchronize") : OK;
}

API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 1; return OK; }

// ------------------------------------------------------------------------------------------------
// Captures and graphs
// ------------------------------------------------------------------------------------------------

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode how) {
  LOCKED;
  if (reinterpret_cast<uintptr_t>(stream) <= 4096) return bad("capture of the default stream");
  if (capturing) return bad("capture during a capture");
  capturing = reinterpret_cast<Stream*>(stream);
  *capturing = {++captures, false};
  strict = how != cudaStreamCaptureModeRelaxed;
  nodes = 0;
  note("capture begins");
  return OK;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  LOCKED;
  *graph = nullptr;
  if (!captured(stream)) return cudaErrorIllegalState;
  bool invalid = capturing->invalid;
  *capturing = {0, false};
  capturing = nullptr;
  strict = false;
  note(invalid ? "capture fails" : "capture ends");
  if (invalid) return cudaErrorStreamCaptureInvalidated;
  *graph = reinterpret_cast<cudaGraph_t>(new Graph{nodes});
  return OK;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* found) {
  Stream* source = captured(stream);
  *found = !source ? cudaStreamCaptureStatusNone
                   : source->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return OK;
}

API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* found, unsigned long long* number, cudaGraph_t*,
    const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  Stream* source = captured(stream);
  if (number) *number = source ? source->capture : 0;
  return cudaStreamIsCapturing(stream, found);
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* given) {
  int previous = mode;
  mode = *given;
  *given = static_cast<cudaStreamCaptureMode>(previous);
  return OK;
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes;
  return OK;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* found, cudaGraph_t graph, unsigned long long) {
  *found = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return OK;
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  launch("graph of " + std::to_string(reinterpret_cast<Graph*>(graph)->nodes), stream);
  return OK;
}

API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete reinterpret_cast<Graph*>(graph); return OK; }

API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  note("graph is freed");
  delete reinterpret_cast<Graph*>(graph);
  return OK;
}

// ------------------------------------------------------------------------------------------------
// Kernels: PyTorch's, as nvcc registers and launches them
// ------------------------------------------------------------------------------------------------

API void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

API void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  LOCKED;
  names[host] = name;
}

API cudaError_t __cudaGetKernel(void** found, const void* host) { *found = (void*)host; return OK; }

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  shape = {grid, block, shared, stream};
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, cudaStream_t* stream) {
  *grid = shape.grid;
  *block = shape.block;
  *shared = shape.shared;
  *stream = shape.stream;
  return OK;
}

API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  LOCKED;
  launch(names[kernel], stream);
  return OK;
}

API cudaError_t __cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  LOCKED;
  launch(names[kernel], stream);
  return OK;
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void**) {
  LOCKED;
  launch(names[kernel], how->stream);
  return OK;
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  return OK;
}

API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return OK; }

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  *count = 2;
  return OK;
}

API cudaError_t cudaGetSymbolAddress(void** found, const void*) {
  static char room[1 << 16];
  *found = room;
  return OK;
}

API cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** found, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* status) {
  bool state = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *found = state ? reinterpret_cast<void*>(primary_state) : reinterpret_cast<void*>(nothing);
  if (status) *status = cudaDriverEntryPointSuccess;
  return OK;
}

// ------------------------------------------------------------------------------------------------
// The driver, as Triton's and Inductor's launchers call it
// ------------------------------------------------------------------------------------------------

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
API int cuDeviceGetCount(int* count) { *count = 1; return 0; }
API int cuDeviceGet(int* device, int) { *device = 0; return 0; }
API int cuDeviceGetAttribute(int* value, int number, int) { *value = attribute(number); return 0; }
API int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) { return primary_state(device, flags, active); }
API int cuDevicePrimaryCtxRetain(void** context, int) { *context = &memory; return 0; }
API int cuCtxGetCurrent(void** context) { *context = &memory; return 0; }
API int cuCtxSetCurrent(void*) { return 0; }
API int cuCtxGetDevice(int* device) { *device = 0; return 0; }
API int cuCtxSetLimit(int, size_t) { return 0; }
API int cuCtxGetLimit(size_t* value, int) { *value = 1 << 20; return 0; }
API int cuGetErrorString(int, const char** text) { *text = "error of the stand-in"; return 0; }
API int cuModuleLoad(void** module, const char*) { *module = &memory; return 0; }
API int cuModuleLoadData(void** module, const void*) { *module = &memory; return 0; }
API int cuModuleLoadDataEx(void** module, const void*, unsigned, void*, void**) { *module = &memory; return 0; }
API int cuModuleUnload(void*) { return 0; }
API int cuModuleGetFunction(void** kernel, void*, const char* name) { *kernel = strdup(name); return 0; }
API int cuFuncSetAttribute(void*, int, int) { return 0; }
API int cuFuncSetCacheConfig(void*, int) { return 0; }
API int cuPointerGetAttribute(void* value, int, unsigned long long pointer) { *(unsigned long long*)value = pointer; return 0; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, void*, int, size_t) { *count = 2; return 0; }

API int cuFuncGetAttribute(int* value, int number, void*) {
  enum { MAX_THREADS = 0, REGISTERS = 4 };  // of CUfunction_attribute
  *value = number == MAX_THREADS ? 1024 : number == REGISTERS ? 32 : 0;
  return 0;
}

API int cuLaunchKernel(
    void* kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, cudaStream_t stream, void**, void**) {
  launch((const char*)kernel, stream);
  return 0;
}

struct LaunchConfig { unsigned grid[3], block[3], shared; cudaStream_t stream; };  // CUlaunchConfig

API int cuLaunchKernelEx(const LaunchConfig* how, void* kernel, void**, void**) {
  launch((const char*)kernel, how->stream);
  return 0;
}

// The loader needs these symbols. Nothing here calls them.
#define UNUSED(name) API int name(...) { note("BAD " #name " is not stood in for"); return 801; }
UNUSED(cuLaunchCooperativeKernel)
UNUSED(cuLinkAddData_v2)
UNUSED(cuLinkComplete)
UNUSED(cuLinkCreate_v2)
UNUSED(cuOccupancyMaxActiveClusters)
UNUSED(cuTensorMapEncodeTiled)
UNUSED(cuTensorMapEncodeIm2col)

// ------------------------------------------------------------------------------------------------
// cuBLAS, as linear layers call it
// ------------------------------------------------------------------------------------------------

namespace { thread_local cudaStream_t blas_stream; }

API int cublasCreate_v2(void** handle) { *handle = malloc(8); return 0; }
API int cublasSetStream_v2(void*, cudaStream_t stream) { blas_stream = stream; return 0; }
API int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
API int cublasSetMathMode(void*, int) { return 0; }
API int cublasGetMathMode(void*, int* found) { *found = 0; return 0; }
API int cublasGetPointerMode_v2(void*, int* found) { *found = 0; return 0; }
API int cublasSetPointerMode_v2(void*, int) { return 0; }
API int cublasSgemm_v2(...) { launch("cublasSgemm", blas_stream); return 0; }
API int cublasGemmEx(...) { launch("cublasGemmEx", blas_stream); return 0; }
API int cublasSgemmStridedBatched(...) { launch("cublasSgemm", blas_stream); return 0; }
API int cublasGemmStridedBatchedEx(...) { launch("cublasGemmEx", blas_stream); return 0; }
API size_t cublasLtGetVersion() { return 130000; }
API int cublasLtMatmulDescCreate(void** found, int, int) { *found = malloc(8); return 0; }
API int cublasLtMatmulDescDestroy(void* given) { free(given); return 0; }
API int cublasLtMatmulDescSetAttribute(...) { return 0; }
API int cublasLtMatrixLayoutCreate(void** found, int, uint64_t, uint64_t, int64_t) { *found = malloc(8); return 0; }
API int cublasLtMatrixLayoutDestroy(void* given) { free(given); return 0; }
API int cublasLtMatrixLayoutSetAttribute(...) { return 0; }
API int cublasLtMatmulPreferenceCreate(void** found) { *found = malloc(8); return 0; }
API int cublasLtMatmulPreferenceDestroy(void* given) { free(given); return 0; }
API int cublasLtMatmulPreferenceSetAttribute(...) { return 0; }

API int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, void* found, int* count) {
  memset(found, 0, 80);  // a cublasLtMatmulHeuristicResult_t
  *count = 1;
  return 0;
}

API int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const void*, void*, size_t, cudaStream_t stream) {
  launch("cublasLtMatmul", stream);
  return 0;
}
