// convext/_call: convext.conv2d of a problem that was called before. What such a call costs in Python (checks, normalised
// arguments, the choice, an autograd.Function, boxed arguments) is several times what the smallest convolution does. Like
// libconvext_storage it takes torch's C++ headers, which hold for one release of torch alone, and is not loaded under
// another; then, and for every call that is not served here, functional.py computes.
//
// Plain calls alone are served (`Call::read`): what makes a call anything else is read off it, not assumed.
//
// * Modes, transforms, tracers, autocast, either vmap and guards below autograd change the thread's local dispatch keys
//   (torch: Note [TLS Initialization]); they must be those of a thread that does nothing special, or of inference mode.
// * torch function modes are asked for, but for that of default devices; overrides need a subclass, and only Tensor and
//   Parameter themselves are taken.
// * A tensor that is anything but dense memory of the CPU (fake, functional, batched, quantized, sparse, negated,
//   a subclass's) has another dispatch key; the key set must be the plain one, exactly.
// * A tensor with a tangent, an inference tensor that a graph would save, and a view where weights are packed, are not
//   served.
// * Compilers do not get here: functional.py asks Dynamo first, and the others put modes on the thread.
//
// Sizes, strides, dtypes, geometry, and whose gradient is wanted are the key to the plan that the selection made
// (fast_call.py), with every check that it makes; so a key that is found has passed them. Settings that change the
// selection empty the table (`forget`).
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cpu/runtime/direct.h"

namespace convext {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- who asks ------------------------------------------------------------------------------------------------------

// What Python gave at import; none of it is ever given back.
struct Hooks {
  const DirectCalls* direct = nullptr;
  PyObject *plan = nullptr, *backward = nullptr, *packed = nullptr, *device_mode = nullptr;
};
Hooks hooks;

// As the constructor of c10::TensorImpl has them, outside and inside of inference mode.
const c10::DispatchKeySet kInferenceTensor = c10::DispatchKeySet(c10::DispatchKey::CPU) |
                                             c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CPUBit);
const c10::DispatchKeySet kPlainTensor =
    kInferenceTensor | c10::getAutogradRelatedKeySetFromBackend(c10::BackendComponent::CPUBit);

bool is_plain(const Tensor& t) { return t.defined() && t.key_set() == kPlainTensor; }

bool in_inference_mode() { return c10::AutogradState::get_tls_state().get_inference_mode(); }

// The thread's local dispatch keys are the usual ones, or those of inference mode; torch keeps them as differences from
// the usual ones. Backward passes exclude named tensors besides, of which none is plain.
bool thread_is_plain() {
  static const uint64_t named = c10::DispatchKeySet(c10::DispatchKey::Named).raw_repr();
  static const uint64_t autograd = c10::autograd_dispatch_keyset.raw_repr();
  static const uint64_t in_place_or_view = c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView).raw_repr();
  const c10::impl::PODLocalDispatchKeySet& local = c10::impl::raw_local_dispatch_key_set;
  const uint64_t excluded = local.excluded_ & ~named;
  if (local.included_ == 0 && excluded == 0) return true;
  return local.included_ == in_place_or_view && excluded == autograd && in_inference_mode();
}

// Whether a torch function mode has to see the call. That of `torch.device` and `torch.set_default_device` only says
// where new tensors lie.
bool a_function_mode_watches() {
  if (!at::impl::torch_function_mode_enabled()) return false;
  for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); ++i) {
    PyObject* const mode = at::impl::PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != hooks.device_mode) return true;
  }
  return false;
}

// Whether this thread's calls that record a gradient of weights are served: not where it is to be contiguous whatever
// the activations are (autograd.contiguous_weight_gradients).
thread_local bool records_weights = true;

// ---- the table -----------------------------------------------------------------------------------------------------

enum Needs : int { kX = 1, kW = 2, kBias = 4 };

struct Key {
  static constexpr int kWords = 26;
  std::array<int64_t, kWords> words;

  bool operator==(const Key& other) const { return std::memcmp(words.data(), other.words.data(), sizeof words) == 0; }
};

struct HashOfKey {
  size_t operator()(const Key& key) const {
    uint64_t a = 0x9e3779b97f4a7c15u, b = 0xc2b2ae3d27d4eb4fu;
    for (int i = 0; i < Key::kWords; i += 2) {
      a = (a ^ static_cast<uint64_t>(key.words[i])) * 0x9fb21c651e98df25u;
      b = (b ^ static_cast<uint64_t>(key.words[i + 1])) * 0xd6e8feb86659fd93u;
    }
    return a ^ (b >> 29) ^ (b << 35) ^ (a >> 31);
  }
};

// Calls of one (backend, pass, kernel); `list` is its counter in Python, whose only element they are added to.
struct Counter {
  PyObject* list;
  std::atomic<int64_t> calls{0};
};

enum class Server { kNobody, kAten, kNative };

struct PassPlan {
  Server server = Server::kNobody;
  int64_t variant = 0;
  bool packs = false;
  Counter* counter = nullptr;

  void count() const { counter->calls.fetch_add(1, std::memory_order_relaxed); }
};

struct Plan {
  PassPlan fprop, dgrad, wgrad;  // nobody: Python
  int needs = 0;                 // whose gradients
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups = 1;
  Geom geom;
  std::array<int64_t, 4> x_size, x_stride, w_size, w_stride, y_size;
  at::ScalarType dtype;
  bool y_channels_last = false, dx_channels_last = false, dw_channels_last = false;
};

constexpr size_t kMostPlans = 4096;  // a service with ever new shapes must not grow without bound
// None of the maps is destroyed: at exit torch and Python may be gone.
auto& plans = *new std::unordered_map<Key, std::shared_ptr<const Plan>, HashOfKey>();
auto& counters = *new std::unordered_map<PyObject*, std::unique_ptr<Counter>>();
int64_t epoch = 0;  // another one whenever plans cease to hold

Counter* counter_of(PyObject* list) {
  std::unique_ptr<Counter>& counter = counters[list];
  if (!counter) {
    Py_INCREF(list);
    counter.reset(new Counter{list});
  }
  return counter.get();
}

// ---- packed weights ------------------------------------------------------------------------------------------------

// The number under which a tensor's packings are kept, as native.py gave it. It is asked for again where the tensor or
// its storage is another one: the weak reference keeps the storage's address from being given to another. What it is
// the number of may be gone; then a kernel says so, and it is asked for anew.
struct KeptNumber {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t number;
};
std::mutex numbers_lock;  // fork() waits for it: a child must not inherit it locked by a thread that it has not
auto& numbers = *new std::unordered_map<const c10::TensorImpl*, KeptNumber>();

void forget_numbers() {
  const std::lock_guard<std::mutex> lock(numbers_lock);
  numbers.clear();
}

// What Python raised, on its way through code without the interpreter's lock.
[[noreturn]] void throw_pythons() {
  python_error error;
  error.persist();
  throw std::move(error);
}

int64_t packed_number(const Tensor& w) {
  const c10::TensorImpl* const impl = w.unsafeGetTensorImpl();
  const c10::Storage& storage = w.storage();
  {
    const std::lock_guard<std::mutex> lock(numbers_lock);
    const auto found = numbers.find(impl);
    if (found != numbers.end() && found->second.storage._unsafe_get_target() == storage.unsafeGetStorageImpl()) {
      return found->second.number;
    }
  }
  const py::gil_scoped_acquire gil;
  const auto given = py::reinterpret_steal<py::object>(
      PyObject_CallOneArg(hooks.packed, py::reinterpret_steal<py::object>(THPVariable_Wrap(w)).ptr()));
  if (!given) throw_pythons();
  const int64_t number = given.cast<int64_t>();
  const std::lock_guard<std::mutex> lock(numbers_lock);
  if (numbers.size() >= kMostPlans) numbers.clear();
  numbers.insert_or_assign(impl, KeptNumber{storage.getWeakStorageImpl(), number});
  return number;
}

int64_t version_of(const Tensor& w) { return w.is_inference() ? 0 : w._version(); }

// ---- what is computed ----------------------------------------------------------------------------------------------

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::ScalarType::Double: return DType::kFloat64;
    case at::ScalarType::BFloat16: return DType::kBFloat16;
    case at::ScalarType::Half: return DType::kFloat16;
    default: return DType::kFloat32;
  }
}

View view_of(const Tensor& t) {
  View view{};
  std::copy_n(t.sizes().data(), 4, view.size);
  std::copy_n(t.strides().data(), 4, view.stride);
  view.dtype = dtype_of(t.scalar_type());
  view.data = t.data_ptr();
  return view;
}

// An AtenTensorHandle is an at::Tensor* (csrc/storage/storage.cpp).
Tensor taken(void* handle) {
  const std::unique_ptr<Tensor> owned(static_cast<Tensor*>(handle));
  return std::move(*owned);
}

// y, or an undefined tensor where the kernel says no. Without the GIL.
Tensor native_fprop(const Plan& plan, const Tensor& x, const Tensor& w, int64_t packed, const Tensor& bias) {
  void* y = nullptr;
  const char* const wrong =
      hooks.direct->fprop(plan.fprop.variant, view_of(x), view_of(w), packed, version_of(w),
                          bias.defined() ? const_cast<Tensor*>(&bias) : nullptr, plan.geom, plan.y_channels_last, &y);
  return wrong == nullptr ? taken(y) : Tensor();
}

at::MemoryFormat format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// This and the two below: what backends/aten.py hands to ATen, and what it makes of the result.
Tensor aten_fprop(const Plan& plan, const Tensor& x, const Tensor& w, const Tensor& bias) {
  const Tensor y = at::convolution(x, w, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt, plan.stride,
                                   plan.padding, plan.dilation, false, {0, 0}, plan.groups);
  return plan.y_channels_last ? y.contiguous(at::MemoryFormat::ChannelsLast) : y;
}

// t with the strides that `torch.empty(memory_format=...)` has, extents of one included (memory_format.py: laid_out).
Tensor laid_out(const Tensor& t, bool channels_last) {
  const auto s = t.sizes();
  const std::array<int64_t, 4> nchw = {s[1] * s[2] * s[3], s[2] * s[3], s[3], 1};
  const std::array<int64_t, 4> nhwc = {s[1] * s[2] * s[3], 1, s[3] * s[1], s[1]};
  if (t.strides().equals(channels_last ? nhwc : nchw)) return t;
  return at::empty(s, t.options(), format(channels_last)).copy_(t);
}

Tensor aten_dgrad(const Plan& plan, const Tensor& dy, const Tensor& w) {
  const Tensor x = at::empty(plan.x_size, dy.options(), format(plan.dx_channels_last));  // its sizes and format count
  const auto found = at::convolution_backward(dy, x, w, at::OptionalIntArrayRef(), plan.stride, plan.padding,
                                              plan.dilation, false, {0, 0}, plan.groups, {true, false, false});
  return laid_out(std::get<0>(found), plan.dx_channels_last);
}

Tensor aten_wgrad(const Plan& plan, const Tensor& dy, const Tensor& x) {
  const Tensor w = at::empty(plan.w_size, dy.options());  // its sizes alone are read
  const auto found = at::convolution_backward(dy, x, w, at::OptionalIntArrayRef(), plan.stride, plan.padding,
                                              plan.dilation, false, {0, 0}, plan.groups, {false, true, false});
  return laid_out(std::get<1>(found), plan.dw_channels_last);
}

bool equal(at::IntArrayRef found, const std::array<int64_t, 4>& expected) { return found.equals(expected); }

// The graph's node of such a call: what autograd.Conv2dFunction is of any other, and with its name. Gradients that are
// recorded, or that no plan serves, are Conv2dFunction's own (`hooks.backward`).
struct ConvNode : public torch::autograd::Node {
  std::shared_ptr<const Plan> plan;
  SavedVariable x, w;

  std::string name() const override { return "Conv2dFunctionBackward"; }

  variable_list apply(variable_list&& gradients) override {
    variable_list found(3);
    const Tensor& dy = gradients[0];
    if (!dy.defined()) return found;
    const std::array<bool, 3> needed = {task_should_compute_output(0), task_should_compute_output(1),
                                        task_should_compute_output(2)};
    Tensor saved_x, saved_w;
    {
      const std::lock_guard<std::mutex> lock(mutex_);  // another thread's backward pass may release them
      if (plan->needs & kW) saved_x = x.unpack(shared_from_this());
      if (plan->needs & kX) saved_w = w.unpack(shared_from_this());
    }
    if (!is_served(dy, saved_x, saved_w, needed) || !compute(dy, saved_x, saved_w, needed, found)) {
      in_python(dy, saved_x, saved_w, needed, found);
    }
    return found;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    w.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(x, false);
    args.collect(w, false);
    args.collect(static_cast<int64_t>(plan->needs));
    for (const auto& values : {plan->stride, plan->padding, plan->dilation}) {
      for (const int64_t value : values) args.collect(value);
    }
    args.collect(plan->groups);
    args.collect(plan->dx_channels_last);
    args.collect(plan->dw_channels_last);
  }

  variable_list apply_with_saved(const variable_list& gradients,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(x);
    saved.before(w);
    variable_list found = apply(variable_list(gradients));
    saved.after(x);
    saved.after(w);
    return found;
  }

 private:
  bool is_served(const Tensor& dy, const Tensor& saved_x, const Tensor& saved_w,
                 const std::array<bool, 3>& needed) const {
    const auto is_operand = [](const Tensor& t, const std::array<int64_t, 4>& size,
                               const std::array<int64_t, 4>& stride) {
      return !t.defined() || (is_plain(t) && equal(t.sizes(), size) && equal(t.strides(), stride));
    };
    // What hooks on saved tensors gave back may be anything.
    return !c10::GradMode::is_enabled() && thread_is_plain() && !at::hasCallbacks() && is_plain(dy) &&
           dy.scalar_type() == plan->dtype && equal(dy.sizes(), plan->y_size) &&
           is_operand(saved_x, plan->x_size, plan->x_stride) && is_operand(saved_w, plan->w_size, plan->w_stride) &&
           (!saved_x.defined() || saved_x.scalar_type() == plan->dtype) &&
           (!saved_w.defined() || saved_w.scalar_type() == plan->dtype) &&
           (!needed[0] || plan->dgrad.server != Server::kNobody) &&
           (!needed[1] || plan->wgrad.server != Server::kNobody);
  }

  // False where a kernel says no.
  bool compute(const Tensor& dy, const Tensor& saved_x, const Tensor& saved_w, const std::array<bool, 3>& needed,
               variable_list& found) const {
    void* result = nullptr;
    if (needed[0] && plan->dgrad.server == Server::kAten) {
      found[0] = aten_dgrad(*plan, dy, saved_w);
    } else if (needed[0]) {
      if (plan->dgrad.packs && saved_w.is_view()) return false;
      const char* wrong = "";
      for (int attempt = 0; attempt < 2 && wrong != nullptr; ++attempt) {  // as in `serve`
        if (attempt > 0) forget_numbers();
        const int64_t packed = plan->dgrad.packs ? packed_number(saved_w) : 0;
        wrong = hooks.direct->dgrad(plan->dgrad.variant, view_of(dy), view_of(saved_w), packed, version_of(saved_w),
                                    plan->x_size[2], plan->x_size[3], plan->geom, plan->dx_channels_last, &result);
      }
      if (wrong != nullptr) return false;
      found[0] = taken(result);
    }
    if (needed[1] && plan->wgrad.server == Server::kAten) {
      found[1] = aten_wgrad(*plan, dy, saved_x);
    } else if (needed[1]) {
      if (hooks.direct->wgrad(plan->wgrad.variant, view_of(dy), view_of(saved_x), plan->w_size[2], plan->w_size[3],
                              plan->geom, plan->dw_channels_last, &result)) {
        return false;
      }
      found[1] = taken(result);
    }
    if (needed[0]) plan->dgrad.count();
    if (needed[1]) plan->wgrad.count();
    if (needed[2]) found[2] = dy.sum(at::IntArrayRef({0, 2, 3}));
    return true;
  }

  void in_python(const Tensor& dy, const Tensor& saved_x, const Tensor& saved_w, const std::array<bool, 3>& needed,
                 variable_list& found) const {
    const py::gil_scoped_acquire gil;
    const auto wrapped = [](const Tensor& t) -> py::object {
      if (!t.defined()) return py::none();
      return py::reinterpret_steal<py::object>(THPVariable_Wrap(t));
    };
    const auto pair = [](const std::array<int64_t, 2>& values) { return py::make_tuple(values[0], values[1]); };
    const py::tuple arguments = py::make_tuple(
        wrapped(dy), wrapped(saved_x), wrapped(saved_w),
        py::make_tuple(pair(plan->stride), pair(plan->padding), pair(plan->dilation), plan->groups),
        py::make_tuple(plan->x_size[2], plan->x_size[3]), py::make_tuple(plan->w_size[2], plan->w_size[3]),
        plan->dx_channels_last, plan->dw_channels_last, py::make_tuple(needed[0], needed[1], needed[2]));
    const auto all = py::reinterpret_steal<py::object>(PyObject_Call(hooks.backward, arguments.ptr(), nullptr));
    if (!all) throw_pythons();
    for (int i = 0; i < 3; ++i) {
      PyObject* const item = PyTuple_GET_ITEM(all.ptr(), i);
      found[i] = item == Py_None ? Tensor() : THPVariable_Unpack(item);
    }
  }
};

// ---- a call --------------------------------------------------------------------------------------------------------

// Of 32 bits, as a Geom has them.
bool read_int(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0 && value >= INT32_MIN && value <= INT32_MAX;
}

bool read_pair(PyObject* object, int64_t* values) {
  if (PyTuple_CheckExact(object)) {
    return PyTuple_GET_SIZE(object) == 2 && read_int(PyTuple_GET_ITEM(object, 0), values[0]) &&
           read_int(PyTuple_GET_ITEM(object, 1), values[1]);
  }
  if (!read_int(object, values[0])) return false;
  values[1] = values[0];
  return true;
}

struct Call {
  Tensor x, w, bias;  // bias may be undefined
  int needs = 0;
  Key key;

  // False where it is not plain.
  bool read(PyObject* const* given) {
    if (!THPVariable_CheckExact(given[0]) || !THPVariable_CheckExact(given[1]) ||
        (given[2] != Py_None && !THPVariable_CheckExact(given[2]))) {
      return false;
    }
    if (!thread_is_plain() || a_function_mode_watches()) return false;
    x = THPVariable_Unpack(given[0]);
    w = THPVariable_Unpack(given[1]);
    if (given[2] != Py_None) bias = THPVariable_Unpack(given[2]);
    int inference = 0;
    for (const Tensor* const t : {&x, &w, &bias}) {
      if (!t->defined()) continue;
      const c10::DispatchKeySet keys = t->key_set();
      if (keys == kInferenceTensor) {
        ++inference;
      } else if (keys != kPlainTensor) {
        return false;
      }
      if (t->_fw_grad(0).defined()) return false;
    }
    if (x.dim() != 4 || w.dim() != 4 || (bias.defined() && bias.dim() != 1)) return false;
    if (c10::GradMode::is_enabled()) {
      needs = (x.requires_grad() ? kX : 0) | (w.requires_grad() ? kW : 0) |
              (bias.defined() && bias.requires_grad() ? kBias : 0);
      if ((needs != 0 && inference != 0) || ((needs & kW) != 0 && !records_weights)) return false;
    }
    int64_t* word = key.words.data();
    *word++ = static_cast<int64_t>(x.scalar_type()) | static_cast<int64_t>(w.scalar_type()) << 8 |
              static_cast<int64_t>(bias.defined() ? static_cast<int>(bias.scalar_type()) : 255) << 16 |
              static_cast<int64_t>(needs) << 24;
    for (const Tensor* const t : {&x, &w}) {
      word = std::copy_n(t->sizes().data(), 4, word);
      word = std::copy_n(t->strides().data(), 4, word);
    }
    *word++ = bias.defined() ? bias.size(0) : -1;
    *word++ = bias.defined() ? bias.stride(0) : -1;
    for (int i = 3; i < 6; ++i, word += 2) {
      if (!read_pair(given[i], word)) return false;
    }
    return read_int(given[6], *word);
  }

  const int64_t* geometry() const { return key.words.data() + 19; }
};

PassPlan pass_plan(const py::handle given) {
  PassPlan plan;
  if (given.is_none()) return plan;
  const auto fields = py::reinterpret_borrow<py::tuple>(given);
  plan.server = fields[0].cast<bool>() ? Server::kNative : Server::kAten;
  plan.variant = fields[1].cast<int64_t>();
  plan.packs = fields[2].cast<bool>();
  plan.counter = counter_of(fields[3].ptr());
  return plan;
}

// The plan of a new key, which Python makes; one that serves nothing where it refuses. Null where it raises: the call
// in Python will say why.
std::shared_ptr<const Plan> learn(const Call& call, PyObject* const* given) {
  const int64_t* const g = call.geometry();
  const int64_t before = epoch;
  const py::tuple geom =
      py::make_tuple(py::make_tuple(g[0], g[1]), py::make_tuple(g[2], g[3]), py::make_tuple(g[4], g[5]), g[6]);
  const py::object needs = py::int_(call.needs);
  PyObject* const arguments[] = {given[0], given[1], given[2], geom.ptr(), needs.ptr()};
  const auto made = py::reinterpret_steal<py::object>(PyObject_Vectorcall(hooks.plan, arguments, 5, nullptr));
  if (!made) {
    if (!PyErr_ExceptionMatches(PyExc_Exception)) throw python_error();
    PyErr_Clear();
    return nullptr;
  }
  auto plan = std::make_shared<Plan>();
  plan->needs = call.needs;
  if (!made.is_none()) {
    const auto fields = py::reinterpret_borrow<py::tuple>(made);
    plan->fprop = pass_plan(fields[0]);
    plan->dgrad = pass_plan(fields[1]);
    plan->wgrad = pass_plan(fields[2]);
    plan->y_channels_last = fields[3].cast<bool>();
    plan->dx_channels_last = fields[4].cast<bool>();
    plan->dw_channels_last = fields[5].cast<bool>();
    plan->y_size = fields[6].cast<std::array<int64_t, 4>>();
    plan->stride = {g[0], g[1]}, plan->padding = {g[2], g[3]}, plan->dilation = {g[4], g[5]}, plan->groups = g[6];
    plan->geom = geom_of(std::vector<int64_t>(g, g + 7));
    std::copy_n(call.x.sizes().data(), 4, plan->x_size.data());
    std::copy_n(call.x.strides().data(), 4, plan->x_stride.data());
    std::copy_n(call.w.sizes().data(), 4, plan->w_size.data());
    std::copy_n(call.w.strides().data(), 4, plan->w_stride.data());
    plan->dtype = call.x.scalar_type();
  }
  if (epoch == before) {
    if (plans.size() >= kMostPlans) plans.clear();
    plans.insert_or_assign(call.key, plan);
  }
  return plan;
}

void record(const Call& call, const std::shared_ptr<const Plan>& plan, Tensor& y) {
  std::shared_ptr<ConvNode> node(new ConvNode(), torch::autograd::deleteNode);
  node->plan = plan;
  node->set_next_edges(torch::autograd::collect_next_edges(call.x, call.w, call.bias));
  if (plan->needs & kW) node->x = SavedVariable(call.x, false);
  if (plan->needs & kX) node->w = SavedVariable(call.w, false);
  torch::autograd::set_history(y, node);
}

// A new reference to the result; null, without an error, where the call is not served. `given`: input, weight, bias,
// stride, padding, dilation, groups.
PyObject* serve(PyObject* const* given) {
  Call call;
  if (!call.read(given)) return nullptr;
  const auto found = plans.find(call.key);
  const std::shared_ptr<const Plan> plan = found != plans.end() ? found->second : learn(call, given);
  if (plan == nullptr || plan->fprop.server == Server::kNobody) return nullptr;
  Tensor y;
  if (plan->fprop.server == Server::kAten) {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView below;  // no tensor has a tangent, and the gradient is recorded here
    y = aten_fprop(*plan, call.x, call.w, call.bias);
  } else {
    if (at::hasCallbacks() || (plan->fprop.packs && call.w.is_view())) return nullptr;
    for (int attempt = 0; attempt < 2 && !y.defined(); ++attempt) {  // the first may have met a number that is gone
      if (attempt > 0) forget_numbers();
      const int64_t packed = plan->fprop.packs ? packed_number(call.w) : 0;
      const py::gil_scoped_release no_gil;
      y = native_fprop(*plan, call.x, call.w, packed, call.bias);
    }
  }
  if (!y.defined()) return nullptr;
  plan->fprop.count();
  if (plan->needs != 0) record(call, plan, y);
  return THPVariable_Wrap(std::move(y));
}

// ---- Python's side -------------------------------------------------------------------------------------------------

PyObject* conv2d(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 7) {
    PyErr_SetString(PyExc_TypeError, "conv2d takes 7 arguments");
    return nullptr;
  }
  PyObject* const y = serve(arguments);
  if (y == nullptr) Py_RETURN_NONE;
  return y;
  END_HANDLE_TH_ERRORS
}

void set_hooks(uintptr_t direct, const py::function& plan, const py::function& backward, const py::function& packed,
               const py::type& device_mode) {
  hooks.direct = reinterpret_cast<const DirectCalls*>(direct);
  hooks.plan = plan.inc_ref().ptr();
  hooks.backward = backward.inc_ref().ptr();
  hooks.packed = packed.inc_ref().ptr();
  hooks.device_mode = device_mode.inc_ref().ptr();
}

void forget() {
  ++epoch;
  plans.clear();
  forget_numbers();
}

// Adds the calls so far to Python's counters.
void count() {
  for (const auto& [list, counter] : counters) {
    const int64_t calls = counter->calls.exchange(0);
    if (calls == 0) continue;
    const auto numbers_of_calls = py::reinterpret_borrow<py::list>(list);
    numbers_of_calls[0] = py::int_(numbers_of_calls[0].cast<int64_t>() + calls);
  }
}

PyTypeObject node_type;
PyMethodDef methods[] = {
    {"conv2d", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&conv2d)), METH_FASTCALL,
     "conv2d(input, weight, bias, stride, padding, dilation, groups): the result, or None where it is not served here."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace convext

PYBIND11_MODULE(_call, m) {
  using namespace convext;
  m.doc() = "convext.conv2d of problems that were called before.";
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("set_hooks", &set_hooks);
  m.def("forget", &forget, "Drops what the selection chose.");
  m.def("record_weights", [](bool record) { records_weights = record; },
        "Whether this thread's calls that record a gradient of weights are served.");
  m.def("count", &count, "Adds the calls so far to Python's counters.");
  torch::autograd::_initFunctionPyTypeObject(node_type, "Conv2dFunctionBackward", nullptr, nullptr);
  torch::autograd::registerCppFunction(typeid(ConvNode), &node_type);
  pthread_atfork([] { numbers_lock.lock(); }, [] { numbers_lock.unlock(); }, [] { numbers_lock.unlock(); });
}
