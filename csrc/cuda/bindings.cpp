// lemur_fast._C.cuda: the CUDA kernels in Python. Every function takes a device and a stream at the end, and returns as
// soon as the launch is made; what CUDA refuses raises RuntimeError.
#include "cuda/bind.h"

#include <cstdint>

#include "bindings.h"
#include "cuda/kernels.h"
#include "cuda/self_test.h"

namespace lemur::cuda {
namespace {

namespace py = pybind11;
using namespace py::literals;

Place place(int device, std::uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

// Arguments are checked with the GIL held; the launch is made without it.
template <typename Args, typename... Given>
auto binding(Args (*checked)(Given...), void (*run)(const Args&, const Place&)) {
  return [checked, run](Given... given, int device, std::uintptr_t stream) {
    const Args args = checked(given...);
    py::gil_scoped_release release;
    run(args, place(device, stream));
  };
}

}  // namespace

void bind(py::module_& cuda) {
  const auto device = "device"_a, stream = "stream"_a;
  bindings::def_rms_norm_fwd(cuda, binding(bindings::rms_norm_fwd, rms_norm_fwd), device, stream);
  bindings::def_rms_norm_bwd(
      cuda,
      [](std::uintptr_t dy, int64_t dy_stride, std::uintptr_t dh, int64_t dh_stride, std::uintptr_t h, int64_t h_stride,
         std::uintptr_t weight, std::uintptr_t rstd, std::uintptr_t dx, std::uintptr_t dw, int64_t rows, int64_t cols,
         int x_dtype, int w_dtype, std::uintptr_t partial, int64_t parts, int device, std::uintptr_t stream) {
        const auto args = bindings::rms_norm_bwd(dy, dy_stride, dh, dh_stride, h, h_stride, weight, rstd, dx, dw, rows,
                                                 cols, x_dtype, w_dtype);
        bindings::check_size("parts", parts, 1);
        if (dw) bindings::check_present("partial", partial, rows);
        py::gil_scoped_release release;
        rms_norm_bwd(args, bindings::pointer<float>(partial), parts, place(device, stream));
      },
      "partial"_a, "parts"_a, device, stream);
  bindings::def_swiglu_fwd(cuda, binding(bindings::swiglu_fwd, swiglu_fwd), device, stream);
  bindings::def_swiglu_bwd(cuda, binding(bindings::swiglu_bwd, swiglu_bwd), device, stream);
  bindings::def_rotary(cuda,
                       binding(
                           bindings::rotary,
                           +[](const bindings::RotaryArguments& args, const Place& place) {
                             rotary(args.xs.data(), static_cast<int>(args.xs.size()), args.tables, place);
                           }),
                       device, stream);
  bindings::def_cross_entropy_fwd(cuda, binding(bindings::cross_entropy_fwd, cross_entropy_fwd), device, stream);
  bindings::def_cross_entropy_bwd(cuda, binding(bindings::cross_entropy_bwd, cross_entropy_bwd), device, stream);

  cuda.def("driver_version", &driver_version,
           "The driver's CUDA version, 1000 * major + 10 * minor; 0 without a driver.");
  cuda.def("device_count", &device_count, "Number of devices; RuntimeError when CUDA cannot start.");
  cuda.def("self_test", &self_test, "device"_a = 0, py::call_guard<py::gil_scoped_release>(),
           "Runs a kernel and checks its result. Returns the architecture of the code that ran, such as 90.");
}

}  // namespace lemur::cuda
