// What autograd and the tensor factories ask of a CUDA device, for a build of torch without CUDA.
//
// Fake tensors on "cuda" need a device guard (which device is current, which stream) and hooks that say that CUDA is
// there. Nothing here runs anything: there are eight devices, one stream each, and every wait is over at once.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstring>
#include <mutex>
#include <unordered_set>

namespace {

constexpr c10::DeviceIndex kDevices = 8;
thread_local c10::DeviceIndex current = 0;  // each thread has its own, as with cudaSetDevice

struct FakeCudaGuard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, current}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }

  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }

  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
};

// Host memory that counts as page-locked.
struct PinnedAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> guard(mutex);
    pinned.insert(data);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }
  static void release(void* data) {
    std::lock_guard<std::mutex> guard(mutex);
    pinned.erase(data);
    c10::free_cpu(data);
  }
  static std::mutex mutex;
  static std::unordered_set<const void*> pinned;
};
std::mutex PinnedAllocator::mutex;
std::unordered_set<const void*> PinnedAllocator::pinned;
PinnedAllocator pinned_allocator;

C10_REGISTER_GUARD_IMPL(CUDA, FakeCudaGuard)

}  // namespace

namespace at {

struct CUDAHooks : public CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> guard(PinnedAllocator::mutex);
    return PinnedAllocator::pinned.count(data) > 0;
  }
  DeviceIndex current_device() const override { return current; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

extern "C" void fake_cuda_set_device(int device) { current = static_cast<c10::DeviceIndex>(device); }
extern "C" int fake_cuda_get_device() { return current; }
