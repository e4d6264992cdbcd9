// The binding: pointers, sizes and scalars in; numbers or an exception out. With
// cuda/bind.cpp the only file that knows Python. Every call on weights releases the interpreter's
// lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu.hpp"
#include "float_environment.hpp"
#include "population.hpp"
#include "shaping.hpp"
#if defined(ESFAST_CUDA)
#include "cuda/bind.hpp"
#include "cuda/cuda.hpp"
#endif

namespace py = pybind11;
using namespace esfast;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Unlocked = py::call_guard<py::gil_scoped_release>;

PerturbCall perturb_call(int noise, const MemberSpec& member, double scale) {
  const DefaultFloats floats;
  const Noise kind = noise_of(noise);
  return {kind, make_source(kind, member), static_cast<float>(scale)};
}

Table make_table(const Array<Segment>& rows) {
  Table table;
  table.segments.assign(rows.data(), rows.data() + rows.size());
  table.chunks = split(table.segments);
  return table;
}

uint64_t update(const Table& table, int noise, const std::vector<MemberSpec>& members,
                const std::vector<double>& coefficients, int decay, double strength,
                bool stochastic, uint64_t rounding_seed, int threads) {
  const DefaultFloats floats;
  const Noise kind = noise_of(noise);
  const Terms terms = make_terms(kind, members, coefficients);
  const UpdateCall call{kind,
                        terms.sources.data(),
                        static_cast<int>(terms.sources.size()),
                        terms.hadamard_coefficients.data(),
                        terms.hadamard_scale,
                        static_cast<Decay>(decay),
                        static_cast<float>(strength),
                        stochastic,
                        rounding_seed};
  return cpu::update(table, call, threads);
}

py::array_t<float> reveal(int noise, const MemberSpec& member, uint32_t tensor, uint64_t first,
                          uint64_t count) {
  py::array_t<float> out(static_cast<py::ssize_t>(count));
  float* data = out.mutable_data();
  const PerturbCall call = perturb_call(noise, member, member.sign);
  py::gil_scoped_release unlocked;
  cpu::reveal(call, tensor, first, count, data);
  return out;
}

template <void (*shape)(const double*, size_t, double*)>
py::array_t<double> shaped(const Array<double>& rewards) {
  const DefaultFloats floats;
  py::array_t<double> fitness(rewards.size());
  shape(rewards.data(), static_cast<size_t>(rewards.size()), fitness.mutable_data());
  return fitness;
}

py::array_t<double> shaped_group(const Array<double>& rewards) {
  const DefaultFloats floats;
  py::array_t<double> fitness(rewards.shape(0));
  shape_group(rewards.data(), static_cast<size_t>(rewards.shape(0)),
              static_cast<size_t>(rewards.shape(1)), fitness.mutable_data());
  return fitness;
}

std::vector<uint32_t> philox_words(uint64_t key, const std::vector<uint32_t>& counter) {
  if (counter.size() != 4) throw std::invalid_argument("a Philox counter has four words");
  std::vector<uint32_t> words(4);
  philox(key, counter.data(), words.data());
  return words;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang++ " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
#if defined(ESFAST_CUDA)
  info["cuda"] = "built; not yet run on a GPU";
#else
  info["cuda"] = "not built";
#endif
  return info;
}

std::vector<std::string> cuda_devices() {
#if defined(ESFAST_CUDA)
  return cuda::devices();
#else
  return {};
#endif
}

void bind_weights(py::module_& m) {
  PYBIND11_NUMPY_DTYPE(Segment, live, base, anchor, live_row_stride, live_column_stride,
                       base_row_stride, anchor_row_stride, rows, cols, origin, canonical_row_stride,
                       tensor, live_dtype, base_dtype, anchor_dtype, anchor_map, anchor_map_end);
  m.attr("segment_dtype") = py::dtype::of<Segment>();
  py::class_<MemberSpec>(m, "MemberSpec")
      .def(py::init<uint64_t, int, uint32_t>(), py::arg("seed"), py::arg("sign"), py::arg("index"));
  py::class_<Records>(m, "Records")
      .def(py::init<>())
      .def_readonly("active", &Records::active)
      .def("bytes", &Records::bytes);
  py::class_<Table>(m, "Table")
      .def(py::init(&make_table), py::arg("segments"))
      .def_property_readonly("chunks", [](const Table& t) { return t.chunks.size(); })
      .def(
          "perturb",
          [](const Table& t, int noise, const MemberSpec& member, double scale, int threads) {
            cpu::perturb(t, perturb_call(noise, member, scale), threads);
          },
          Unlocked())
      .def(
          "perturb_recorded",
          [](const Table& t, Records& r, int noise, const MemberSpec& member, double scale,
             int threads) { cpu::perturb(t, perturb_call(noise, member, scale), r, threads); },
          Unlocked())
      .def("restore", &cpu::restore, Unlocked())
      .def("capture", &cpu::capture, Unlocked())
      .def("refresh", &cpu::refresh, Unlocked())
      .def("update", &update, Unlocked())
      .def("checksum", &cpu::checksum, Unlocked())
      .def(
          "expected_record_bytes",
          [](const Table& t, int noise, const MemberSpec& member, double scale, int stride,
             int threads) {
            return cpu::expected_record_bytes(t, perturb_call(noise, member, scale), stride,
                                              threads);
          },
          Unlocked());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  // A bad argument is the user's to mend: esfast.ConfigError, which is a ValueError.
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::invalid_argument& bad) {
      const py::dict loaded = py::module_::import("sys").attr("modules");
      const bool alone = !loaded.contains("esfast.errors");  // the core without its package
      py::set_error(alone ? py::reinterpret_borrow<py::object>(PyExc_ValueError)
                          : loaded["esfast.errors"].attr("ConfigError"),
                    bad.what());
    }
  });
  m.doc() = "esfast's C++ core: noise, perturbation, restore, update, checksum, reward shaping.";
  m.attr("noise_version") = 1;
  bind_weights(m);
  m.def("targets", &cpu::targets);
  m.def("target", [] { return std::string(cpu::target().name); });
  m.def("set_target", &cpu::set_target);
  m.def("build_info", &build_info);
  m.def("cuda_devices", &cuda_devices);
#if defined(ESFAST_CUDA)
  cuda::bind(m);
#endif
  m.def("reveal", &reveal);
  m.def("philox", &philox_words);
  m.def("derive_seed", &derive_seed);
  m.def("rank", &shaped<shape_rank>);
  m.def("z_score", &shaped<shape_z_score>);
  m.def("centered_rank", &shaped<shape_centered_rank>);
  m.def("raw", &shaped<shape_raw>);
  m.def("group_centered", &shaped_group);
}
