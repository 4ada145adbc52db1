#include "tests/fuzz/proto_mutator.h"

#include <iterator>
#include <limits>
#include <string>
#include <vector>

namespace headwater::fuzz {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr int kMostElements = 300;
constexpr int kDeepest = 8;

class Mutator {
 public:
  Mutator(std::mt19937_64* random, void (*mutate_bytes)(std::string*))
      : random_(*random), mutate_bytes_(mutate_bytes) {}

  // A value that is there, any with the same chance however deep it lies: what limits are checked on.
  void MutateValue(Message* message) {
    std::vector<Value> values;
    Collect(message, 0, &values);
    if (values.empty()) return;
    const Value& value = values[static_cast<size_t>(Below(static_cast<int>(values.size())))];
    SetScalar(value.message, value.field, value.index);
  }

  void Mutate(Message* message, int depth) {
    const auto* type = message->GetDescriptor();
    if (type->field_count() == 0) return;
    const FieldDescriptor* field = type->field(Below(type->field_count()));
    const Reflection* reflection = message->GetReflection();
    if (field->is_repeated()) {
      MutateRepeated(message, field, depth);
    } else if (Below(8) == 0) {
      reflection->ClearField(message, field);
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      if (depth < kDeepest) Mutate(reflection->MutableMessage(message, field), depth + 1);
    } else {
      SetScalar(message, field, -1);
    }
  }

 private:
  struct Value {
    Message* message;
    const FieldDescriptor* field;
    int index;  // -1: not repeated
  };

  void Collect(Message* message, int depth, std::vector<Value>* values) {
    const Reflection* reflection = message->GetReflection();
    std::vector<const FieldDescriptor*> fields;
    reflection->ListFields(*message, &fields);
    for (const FieldDescriptor* field : fields) {
      const bool of_messages = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
      const int size = field->is_repeated() ? reflection->FieldSize(*message, field) : 1;
      for (int i = 0; i < size && i < kMostElements; ++i) {
        if (!of_messages) {
          values->push_back({message, field, field->is_repeated() ? i : -1});
        } else if (depth < kDeepest) {
          Collect(field->is_repeated() ? reflection->MutableRepeatedMessage(message, field, i)
                                       : reflection->MutableMessage(message, field),
                  depth + 1, values);
        }
      }
    }
  }

  int Below(int limit) { return static_cast<int>(random_() % static_cast<uint64_t>(limit)); }

  // 0, a power of two or its neighbour, a neighbour of what was there, or anything.
  uint64_t Number(uint64_t old) {
    switch (Below(6)) {
      case 0:
        return 0;
      case 1: {
        // Where products of sizes wrap, more often.
        constexpr int kEdges[] = {16, 31, 32, 61, 62, 63};
        const uint64_t power = uint64_t{1} << (Below(2) == 0 ? kEdges[Below(std::size(kEdges))] : Below(64));
        return Below(2) == 0 ? power : power + static_cast<uint64_t>(Below(3)) - 1;
      }
      case 2:
        return uint64_t{0} - (uint64_t{1} << Below(64));
      case 3:
        return static_cast<uint64_t>(Below(300));
      case 4:
        return old + static_cast<uint64_t>(Below(3)) - 1;
      default:
        return random_();
    }
  }

  double Real() {
    using Limits = std::numeric_limits<double>;
    const double values[] = {0,
                             -0.0,
                             1,
                             -1,
                             0.5,
                             Limits::infinity(),
                             -Limits::infinity(),
                             Limits::quiet_NaN(),
                             Limits::max(),
                             Limits::min(),
                             Limits::denorm_min(),
                             1e18,
                             1e-300,
                             60};
    return Below(2) == 0 ? values[Below(std::size(values))] : static_cast<double>(Below(1000)) / 997;
  }

  // Of the element at `index`, or of the field where that is -1; -2 adds an element.
  void SetScalar(Message* message, const FieldDescriptor* field, int index) {
    const Reflection* r = message->GetReflection();
#define HW_SET(Type, value)                             \
  if (index == -1) {                                    \
    r->Set##Type(message, field, value);                \
  } else if (index == -2) {                             \
    r->Add##Type(message, field, value);                \
  } else {                                              \
    r->SetRepeated##Type(message, field, index, value); \
  }                                                     \
  break
#define HW_OLD(Type)                             \
  (index == -1   ? r->Get##Type(*message, field) \
   : index == -2 ? 0                             \
                 : r->GetRepeated##Type(*message, field, index))
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        HW_SET(Int32, static_cast<int32_t>(Number(static_cast<uint64_t>(HW_OLD(Int32)))));
      case FieldDescriptor::CPPTYPE_INT64:
        HW_SET(Int64, static_cast<int64_t>(Number(static_cast<uint64_t>(HW_OLD(Int64)))));
      case FieldDescriptor::CPPTYPE_UINT32:
        HW_SET(UInt32, static_cast<uint32_t>(Number(HW_OLD(UInt32))));
      case FieldDescriptor::CPPTYPE_UINT64:
        HW_SET(UInt64, Number(HW_OLD(UInt64)));
      case FieldDescriptor::CPPTYPE_DOUBLE:
        HW_SET(Double, Real());
      case FieldDescriptor::CPPTYPE_FLOAT:
        HW_SET(Float, static_cast<float>(Real()));
      case FieldDescriptor::CPPTYPE_BOOL:
        HW_SET(Bool, Below(2) == 0);
      case FieldDescriptor::CPPTYPE_ENUM:
        // proto3 keeps values that it does not know.
        HW_SET(EnumValue, Below(4) == 0 ? static_cast<int>(Number(0)) : Below(8));
      case FieldDescriptor::CPPTYPE_STRING: {
        std::string text = index == -1   ? r->GetString(*message, field)
                           : index == -2 ? std::string()
                                         : r->GetRepeatedString(*message, field, index);
        mutate_bytes_(&text);
        HW_SET(String, text);
      }
      case FieldDescriptor::CPPTYPE_MESSAGE:
        break;
    }
#undef HW_SET
#undef HW_OLD
  }

  void MutateRepeated(Message* message, const FieldDescriptor* field, int depth) {
    const Reflection* reflection = message->GetReflection();
    const bool of_messages = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
    const int size = reflection->FieldSize(*message, field);
    const int choice = Below(6);
    if (size == 0 || (choice == 0 && size < kMostElements)) {
      if (!of_messages) {
        SetScalar(message, field, -2);
        return;
      }
      Message* const added = reflection->AddMessage(message, field);
      // A map refuses a key that is there twice; elsewhere a second copy is a good start.
      if (size > 0 && !field->is_map()) {
        added->CopyFrom(reflection->GetRepeatedMessage(*message, field, Below(size)));
      }
      if (depth < kDeepest) Mutate(added, depth + 1);
    } else if (choice == 1) {
      reflection->SwapElements(message, field, Below(size), size - 1);
      reflection->RemoveLast(message, field);
    } else if (choice == 2 && size > 1) {
      reflection->SwapElements(message, field, Below(size), Below(size));
    } else if (of_messages) {
      if (depth < kDeepest)
        Mutate(reflection->MutableRepeatedMessage(message, field, Below(size)), depth + 1);
    } else {
      SetScalar(message, field, Below(size));
    }
  }

  std::mt19937_64& random_;
  void (*const mutate_bytes_)(std::string*);
};

}  // namespace

void MutateMessage(Message* message, std::mt19937_64* random, void (*mutate_bytes)(std::string*)) {
  Mutator mutator(random, mutate_bytes);
  const int times = 1 + static_cast<int>((*random)() % 4);
  for (int i = 0; i < times; ++i) {
    if ((*random)() % 2 == 0) {
      mutator.MutateValue(message);
    } else {
      mutator.Mutate(message, 0);
    }
  }
}

}  // namespace headwater::fuzz
