// The binding of cuda.hpp: addresses, sizes and a stream in; nothing or an exception out. A failed
// call raises esfast.errors.EsfastError with CUDA's own words. Compiled by the host's compiler
// alone.
#include "bind.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../float_environment.hpp"
#include "cuda.hpp"

namespace py = pybind11;

namespace esfast::cuda {
namespace {

using Rows = py::array_t<Segment, py::array::c_style | py::array::forcecast>;

void check(const Status& status) {
  if (status.ok()) return;
  const py::object kind = py::module_::import("esfast.errors").attr("EsfastError");
  py::set_error(kind, ("CUDA: " + status.message).c_str());
  throw py::error_already_set();
}

PerturbCall perturb_call(int noise, const MemberSpec& member, double scale) {
  const DefaultFloats floats;
  const Noise kind = noise_of(noise);
  return {kind, make_source(kind, member), static_cast<float>(scale)};
}

// An update's call and the vectors that it points into.
struct Population {
  Terms terms;
  UpdateCall call;

  Population(int noise, const std::vector<MemberSpec>& members,
             const std::vector<double>& coefficients) {
    const DefaultFloats floats;
    const Noise kind = noise_of(noise);
    terms = make_terms(kind, members, coefficients);
    call = {kind,
            terms.sources.data(),
            static_cast<int>(terms.sources.size()),
            terms.hadamard_coefficients.data(),
            terms.hadamard_scale,
            Decay::none,
            0.0f,
            false,
            0};
  }
  Population(const Population&) = delete;
  Population& operator=(const Population&) = delete;
};

py::tuple plan_of(const Rows& rows) {
  const Plan plan = make_plan(std::vector<Segment>(rows.data(), rows.data() + rows.size()));
  const size_t bytes = plan.spans.size() * sizeof(Span);
  py::array_t<uint8_t> spans(static_cast<py::ssize_t>(bytes));
  if (bytes) memcpy(spans.mutable_data(), plan.spans.data(), bytes);
  return py::make_tuple(spans, plan.tiles);
}

void bind_calls(py::module_& m) {
  py::class_<Place>(m, "Place", py::module_local())
      .def(py::init<uint64_t, uint32_t, uint32_t, int, uint64_t>(), py::arg("spans"),
           py::arg("count"), py::arg("tiles"), py::arg("device"), py::arg("stream"));
  py::class_<Buffers>(m, "Buffers", py::module_local())
      .def(py::init<uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint32_t>(), py::arg("marks"),
           py::arg("offsets"), py::arg("values"), py::arg("demand"), py::arg("capacity"),
           py::arg("slab"));
  py::class_<Population>(m, "Population", py::module_local())
      .def(py::init<int, const std::vector<MemberSpec>&, const std::vector<double>&>(),
           py::arg("noise"), py::arg("members"), py::arg("coefficients"))
      .def_property_readonly("bytes", [](const Population& p) { return update_bytes(p.call); });
  m.def("perturb", [](const Place& place, int noise, const MemberSpec& member, double scale) {
    check(perturb(place, perturb_call(noise, member, scale)));
  });
  m.def("record", [](const Place& place, int noise, const MemberSpec& member, double scale,
                     const Buffers& buffers, uint32_t stride) {
    check(record(place, perturb_call(noise, member, scale), buffers, stride));
  });
  m.def("restore", [](const Place& place, int noise, const MemberSpec& member, double scale,
                      const Buffers& buffers) {
    check(restore(place, perturb_call(noise, member, scale), buffers));
  });
  m.def("capture", [](const Place& place) { check(capture(place)); });
  m.def("refresh", [](const Place& place) { check(refresh(place)); });
  m.def("checksum", [](const Place& place, uint64_t sum) { check(checksum(place, sum)); });
  m.def("update",
        [](const Place& place, const Population& population, int decay, double strength,
           bool stochastic, uint64_t rounding_seed, uint64_t workspace, uint64_t saturated) {
          UpdateCall call = population.call;
          call.decay = static_cast<Decay>(decay);
          call.strength = static_cast<float>(strength);
          call.stochastic = stochastic;
          call.rounding_seed = rounding_seed;
          check(update(place, call, workspace, saturated));
        });
}

}  // namespace

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("cuda", "Kernels on caller-owned device memory.");
  m.attr("tile") = kTileUnits * kUnit;
  m.attr("tile_units") = kTileUnits;
  m.attr("span_bytes") = sizeof(Span);
  m.def("plan", &plan_of, py::arg("segments"));
  m.def("devices", &devices);
  m.def("prepare", [](int device) { check(prepare(device)); });
  m.def("warps", &warps);
  bind_calls(m);
  m.def("roots", [](int device, uint64_t stream, uint32_t first, uint64_t count, uint64_t out) {
    check(roots(device, stream, first, count, out));
  });
  m.def("roundings", [](int device, uint64_t stream, uint32_t first, uint64_t count, uint64_t out) {
    check(roundings(device, stream, first, count, out));
  });
  m.def("shape_doubles", &shape_doubles);
  m.def("shape", [](int shaping, int device, uint64_t stream, uint64_t rewards, uint64_t population,
                    uint64_t prompts, uint64_t workspace, uint64_t fitness) {
    check(shape(static_cast<Shaping>(shaping), device, stream, rewards, population, prompts,
                workspace, fitness));
  });
}

}  // namespace esfast::cuda
