// Python's arithmetic on the numbers of a program: sizes, and values that the host reads from tensors.
#pragma once

#include <ATen/core/ivalue.h>

#include <string>

namespace anabranch::runtime {

// What is not done here as Python does it: a result past 64 bits, a division by zero, a number for what takes none. The
// call goes to Python, which computes it or raises its own error.
struct Declined {};

enum class NumberOp {
  kAdd,
  kSub,
  kMul,
  kTrueDiv,
  kFloorDiv,
  kMod,
  kPow,
  kNeg,
  kPos,
  kAbs,
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kAnd,
  kOr,
  kXor,
  kNot,
  kMax,
  kMin,
  kFloat,
  kInt,
  kFloor,
  kCeil,
  kSqrt,
  kSum,
  kIte,
  kSize,
  kStride,
  kNumel,
  kOffset,
};

// The operation of a name ("floordiv"). Throws c10::Error where there is none.
NumberOp number_op(const std::string& name);

// Numbers are int, double or bool, as in Python; for `kSize` and the like the first is a tensor. Throws Declined.
c10::IValue compute(NumberOp op, const c10::IValue* given, size_t count);

// Whether an `if` takes it for true.
bool is_true(const c10::IValue& value);

// A number as an operator's argument of type int, float, bool, tensor, or number.
c10::IValue converted(const c10::IValue& number, c10::TypeKind wanted);

}  // namespace anabranch::runtime
