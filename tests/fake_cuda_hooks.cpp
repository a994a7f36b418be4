// What PyTorch's core asks of the CUDA library, answered without one: two devices that are always there, a
// current device and current streams, and no memory. With it, fake tensors on "cuda" run forward and backward
// on a CPU build. Loaded before torch is imported; fake_cuda.py shares the current device and streams.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr int DEVICES = 2;
thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[DEVICES];

c10::Device cuda(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }

} // namespace

extern "C" int fake_cuda_exchange_device(int index) {
  int previous = current_device;
  if (index >= 0)
    current_device = static_cast<c10::DeviceIndex>(index);
  return previous;
}

extern "C" int64_t fake_cuda_exchange_stream(int device, int64_t id) {
  int64_t previous = current_streams[device];
  if (id >= 0)
    current_streams[device] = id;
  return previous;
}

namespace {

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device d) const override { return cuda(fake_cuda_exchange_device(d.index())); }
  c10::Device getDevice() const override { return cuda(current_device); }
  void setDevice(c10::Device d) const override { fake_cuda_exchange_device(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { fake_cuda_exchange_device(d.index()); }
  c10::Stream getStream(c10::Device d) const override {
    auto index = d.has_index() ? d.index() : current_device;
    return c10::Stream(c10::Stream::UNSAFE, cuda(index), current_streams[index]);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto previous = fake_cuda_exchange_stream(s.device_index(), s.id());
    return c10::Stream(c10::Stream::UNSAFE, s.device(), previous);
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

struct CUDAHooks final /* the name by which PyTorch looks for it */ : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex current_device() const override { return ::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return ::current_device; }
  int getNumGPUs() const override { return DEVICES; }
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

} // namespace

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at
