#include "numbers.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

namespace anabranch::runtime {

namespace {

constexpr std::array<std::pair<const char*, NumberOp>, 33> kOps{{
    {"add", NumberOp::kAdd},
    {"sub", NumberOp::kSub},
    {"mul", NumberOp::kMul},
    {"truediv", NumberOp::kTrueDiv},
    {"floordiv", NumberOp::kFloorDiv},
    {"mod", NumberOp::kMod},
    {"pow", NumberOp::kPow},
    {"neg", NumberOp::kNeg},
    {"pos", NumberOp::kPos},
    {"abs", NumberOp::kAbs},
    {"eq", NumberOp::kEq},
    {"ne", NumberOp::kNe},
    {"lt", NumberOp::kLt},
    {"le", NumberOp::kLe},
    {"gt", NumberOp::kGt},
    {"ge", NumberOp::kGe},
    {"and", NumberOp::kAnd},
    {"or", NumberOp::kOr},
    {"xor", NumberOp::kXor},
    {"not", NumberOp::kNot},
    {"max", NumberOp::kMax},
    {"min", NumberOp::kMin},
    {"float", NumberOp::kFloat},
    {"int", NumberOp::kInt},
    {"floor", NumberOp::kFloor},
    {"ceil", NumberOp::kCeil},
    {"sqrt", NumberOp::kSqrt},
    {"sum", NumberOp::kSum},
    {"ite", NumberOp::kIte},
    {"size", NumberOp::kSize},
    {"stride", NumberOp::kStride},
    {"numel", NumberOp::kNumel},
    {"offset", NumberOp::kOffset},
}};

// All integers of at most this size are floats, too.
constexpr int64_t kExact = int64_t{1} << 53;

bool is_float(const c10::IValue& x) {
  return x.isDouble();
}

int64_t integer(const c10::IValue& x) {
  if (x.isInt()) return x.toInt();
  if (x.isBool()) return x.toBool();
  throw Declined{};
}

double real(const c10::IValue& x) {
  return x.isDouble() ? x.toDouble() : static_cast<double>(integer(x));
}

// Of an integer only if no float lies nearer to another one.
double exact(const c10::IValue& x) {
  if (x.isDouble()) return x.toDouble();
  auto n = integer(x);
  if (n > kExact || n < -kExact) throw Declined{};
  return static_cast<double>(n);
}

c10::IValue floor_to_int(double x) {
  // Past these no float is an int64; NaN fails both.
  if (!(x >= -0x1p63 && x < 0x1p63)) throw Declined{};
  return static_cast<int64_t>(x);
}

c10::IValue floor_div(const c10::IValue& a, const c10::IValue& b, bool remainder) {
  if (!is_float(a) && !is_float(b)) {
    auto x = integer(a), y = integer(b);
    if (!y || (y == -1 && x == std::numeric_limits<int64_t>::min())) throw Declined{};
    auto quotient = x / y, rest = x % y;
    if (rest && (rest < 0) != (y < 0)) {
      --quotient;
      rest += y;
    }
    return remainder ? rest : quotient;
  }
  // As CPython's float_divmod.
  auto x = real(a), y = real(b);
  if (y == 0) throw Declined{};
  auto rest = std::fmod(x, y), quotient = (x - rest) / y;
  if (rest != 0) {
    if ((y < 0) != (rest < 0)) {
      rest += y;
      quotient -= 1;
    }
  } else {
    rest = std::copysign(0.0, y);
  }
  if (remainder) return rest;
  if (quotient == 0) return std::copysign(0.0, x / y);
  auto floored = std::floor(quotient);
  return quotient - floored > 0.5 ? floored + 1 : floored;
}

c10::IValue power(const c10::IValue& a, const c10::IValue& b) {
  if (!is_float(a) && !is_float(b) && integer(b) >= 0) {
    int64_t made = 1, base = integer(a);
    for (auto left = integer(b); left; --left) {
      // It ends soon: past 64 factors other than these there is an overflow.
      if (base == 0 || base == 1) return base;
      if (base == -1) return left % 2 ? int64_t{-1} : int64_t{1};
      if (__builtin_mul_overflow(made, base, &made)) throw Declined{};
    }
    return made;
  }
  auto x = exact(a), y = exact(b);
  if (!(x > 0) || !std::isfinite(x) || !std::isfinite(y)) throw Declined{};
  auto made = std::pow(x, y);
  if (!std::isfinite(made)) throw Declined{};
  return made;
}

bool compare(NumberOp op, const c10::IValue& a, const c10::IValue& b) {
  auto of = [op](auto x, auto y) {
    switch (op) {
      case NumberOp::kEq:
        return x == y;
      case NumberOp::kNe:
        return x != y;
      case NumberOp::kLt:
        return x < y;
      case NumberOp::kLe:
        return x <= y;
      case NumberOp::kGt:
        return x > y;
      default:
        return x >= y;
    }
  };
  return is_float(a) || is_float(b) ? of(exact(a), exact(b)) : of(integer(a), integer(b));
}

c10::IValue arithmetic(NumberOp op, const c10::IValue& a, const c10::IValue& b) {
  if (is_float(a) || is_float(b)) {
    auto x = real(a), y = real(b);
    return op == NumberOp::kAdd ? x + y : op == NumberOp::kSub ? x - y : x * y;
  }
  int64_t made = 0, x = integer(a), y = integer(b);
  bool is_past = op == NumberOp::kAdd   ? __builtin_add_overflow(x, y, &made)
                 : op == NumberOp::kSub ? __builtin_sub_overflow(x, y, &made)
                                        : __builtin_mul_overflow(x, y, &made);
  if (is_past) throw Declined{};
  return made;
}

c10::IValue bitwise(NumberOp op, const c10::IValue& a, const c10::IValue& b) {
  auto x = integer(a), y = integer(b);
  auto made = op == NumberOp::kAnd ? x & y : op == NumberOp::kOr ? x | y : x ^ y;
  if (a.isBool() && b.isBool()) return made != 0;
  return made;
}

// The first of equal ones, and of two of which one is NaN, as Python's max and min.
c10::IValue extreme(NumberOp op, const c10::IValue& a, const c10::IValue& b) {
  auto& chosen = compare(op == NumberOp::kMax ? NumberOp::kGt : NumberOp::kLt, b, a) ? b : a;
  if (is_float(a) || is_float(b)) return real(chosen);
  return chosen;
}

const at::Tensor& tensor(const c10::IValue& x) {
  if (!x.isTensor()) throw Declined{};
  return x.toTensor();
}

c10::IValue of_one(NumberOp op, const c10::IValue& x) {
  switch (op) {
    case NumberOp::kNeg:
      if (is_float(x)) return -x.toDouble();
      return arithmetic(NumberOp::kSub, int64_t{0}, x);
    case NumberOp::kPos:
      return is_float(x) ? x : c10::IValue(integer(x));
    case NumberOp::kAbs:
      if (is_float(x)) return std::fabs(x.toDouble());
      return integer(x) < 0 ? of_one(NumberOp::kNeg, x) : c10::IValue(integer(x));
    case NumberOp::kNot:
      return !is_true(x);
    case NumberOp::kFloat:
      return real(x);
    case NumberOp::kInt:
      return is_float(x) ? floor_to_int(std::trunc(x.toDouble())) : c10::IValue(integer(x));
    case NumberOp::kFloor:
      return is_float(x) ? floor_to_int(std::floor(x.toDouble())) : c10::IValue(integer(x));
    case NumberOp::kCeil:
      return is_float(x) ? floor_to_int(std::ceil(x.toDouble())) : c10::IValue(integer(x));
    case NumberOp::kSqrt:
      if (!(real(x) >= 0)) throw Declined{};
      return std::sqrt(real(x));
    case NumberOp::kNumel:
      return tensor(x).numel();
    case NumberOp::kOffset:
      return tensor(x).storage_offset();
    default:
      throw Declined{};
  }
}

c10::IValue of_two(NumberOp op, const c10::IValue& a, const c10::IValue& b) {
  switch (op) {
    case NumberOp::kAdd:
    case NumberOp::kSub:
    case NumberOp::kMul:
      return arithmetic(op, a, b);
    case NumberOp::kTrueDiv:
      if (exact(b) == 0) throw Declined{};
      return exact(a) / exact(b);
    case NumberOp::kFloorDiv:
      return floor_div(a, b, false);
    case NumberOp::kMod:
      return floor_div(a, b, true);
    case NumberOp::kPow:
      return power(a, b);
    case NumberOp::kEq:
    case NumberOp::kNe:
    case NumberOp::kLt:
    case NumberOp::kLe:
    case NumberOp::kGt:
    case NumberOp::kGe:
      return compare(op, a, b);
    case NumberOp::kAnd:
    case NumberOp::kOr:
    case NumberOp::kXor:
      return bitwise(op, a, b);
    case NumberOp::kMax:
    case NumberOp::kMin:
      return extreme(op, a, b);
    case NumberOp::kSize:
      return tensor(a).size(integer(b));
    case NumberOp::kStride:
      return tensor(a).stride(integer(b));
    default:
      throw Declined{};
  }
}

}  // namespace

NumberOp number_op(const std::string& name) {
  for (auto& [known, op] : kOps) {
    if (name == known) return op;
  }
  TORCH_CHECK(false, "no operation on numbers is called ", name);
}

c10::IValue compute(NumberOp op, const c10::IValue* given, size_t count) {
  if (op == NumberOp::kSum) {
    c10::IValue sum = int64_t{0};
    // Of integers: Python adds floats with what rounding has lost.
    for (size_t i = 0; i < count; ++i) sum = arithmetic(NumberOp::kAdd, sum, integer(given[i]));
    return sum;
  }
  if (op == NumberOp::kIte && count == 3) {
    if (!given[0].isBool() || given[1].isInt() != given[2].isInt() || given[1].isBool() != given[2].isBool()) {
      throw Declined{};
    }
    return given[0].toBool() ? given[1] : given[2];
  }
  if (count == 1) return of_one(op, given[0]);
  if (count == 2) return of_two(op, given[0], given[1]);
  throw Declined{};
}

bool is_true(const c10::IValue& value) {
  if (value.isTensor()) {
    if (value.toTensor().numel() != 1) throw Declined{};
    return value.toTensor().is_nonzero();
  }
  return is_float(value) ? value.toDouble() != 0 : integer(value) != 0;
}

c10::IValue converted(const c10::IValue& number, c10::TypeKind wanted) {
  switch (wanted) {
    case c10::TypeKind::IntType:
      return integer(number);
    case c10::TypeKind::FloatType:
      return real(number);
    case c10::TypeKind::BoolType:
      if (!number.isBool()) throw Declined{};
      return number;
    case c10::TypeKind::TensorType: {
      // As a number beside a tensor in Python: of no dtype that would count.
      auto scalar = number.toScalar();
      auto made = at::scalar_tensor(scalar, at::dtype(scalar.type()));
      made.unsafeGetTensorImpl()->set_wrapped_number(true);
      return made;
    }
    default:
      return number;
  }
}

}  // namespace anabranch::runtime
