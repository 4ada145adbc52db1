"""The protos as descriptors: compiled, cut into messages, filled with values, and held against those of an earlier version.

Used by tools/make_wire_golden.py and tests/proto/golden_test.py.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "headwater.v1"
# Written as it is in the prefix of a KV frame, not as what the service's method names.
OWN_FRAMES = ("headwater.v1.KvFrameHeader",)
Field = descriptor_pb2.FieldDescriptorProto


def compile_protos(proto: Path = ROOT / "proto") -> descriptor_pb2.FileDescriptorSet:
    """Descriptors of proto/headwater/v1 with what they import, without comments."""
    import grpc_tools
    from google.rpc import status_pb2

    sources = sorted(str(path.relative_to(proto)) for path in proto.glob("headwater/v1/*.proto"))
    includes = [proto, Path(status_pb2.__file__).parents[2], Path(grpc_tools.__file__).parent / "_proto"]
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.binpb"
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *(f"-I{include}" for include in includes),
                        "--include_imports", "-o", str(image), *sources], check=True, timeout=120)
        return descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())


class Schema:
    """Message classes of a descriptor set, in a pool of their own."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet):
        self.files = files
        self.pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self.pool.Add(file)

    def descriptor(self, name: str):
        return self.pool.FindMessageTypeByName(name)

    def new(self, name: str):
        return message_factory.GetMessageClass(self.descriptor(name))()

    def roots(self) -> list:
        """Full names of what crosses a process boundary by itself: what services take and give, what is part of nothing
        else (the roles file), and OWN_FRAMES."""
        ours = [file for file in self.files.file if file.package == PACKAGE]
        called = {kind.lstrip(".") for file in ours for service in file.service for method in service.method
                  for kind in (method.input_type, method.output_type)}
        messages = {f"{PACKAGE}.{message.name}": message for file in ours for message in file.message_type}
        inner = {field.type_name.lstrip(".") for message in messages.values()
                 for part in (message, *message.nested_type) for field in part.field}
        own = {name for name in OWN_FRAMES if name in messages}
        return sorted(called | (messages.keys() - inner) | own)


def is_map(field) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def oneof_of(field):
    """The oneof that a field is a case of; None also for what the proto calls `optional`."""
    oneof = field.containing_oneof
    if oneof is None or (len(oneof.fields) == 1 and oneof.name == f"_{field.name}"):
        return None
    return oneof


def is_message(field) -> bool:
    return field.message_type is not None and not is_map(field)


def variants(descriptor) -> int:
    """How many messages it takes to have each case of each oneof of it and of its parts in one."""
    plain = [variants(field.message_type) for field in descriptor.fields if is_message(field) and not oneof_of(field)]
    cases = [sum(case_variants(field) for field in oneof.fields)
             for oneof in descriptor.oneofs if oneof_of(oneof.fields[0])]
    return max([1, *plain, *cases])


def case_variants(field) -> int:
    return variants(field.message_type) if is_message(field) else 1


class Filler:
    """Sets every field of a message, each number and text to another value."""

    def __init__(self):
        self.count = 0
        self.cases = []  # names of the oneofs' cases that were taken

    def scalar(self, field):
        self.count += 1
        n, kind = self.count, field.type
        if kind in (Field.TYPE_DOUBLE, Field.TYPE_FLOAT):
            return n + 0.25
        if kind == Field.TYPE_BOOL:
            return True
        if kind == Field.TYPE_ENUM:
            values = [value.number for value in field.enum_type.values if value.number != 0]
            return values[n % len(values)]
        if kind == Field.TYPE_STRING:
            return f"{field.name} {n} \u00fc"
        if kind == Field.TYPE_BYTES:
            return bytes([n % 256, 0, 255, n // 256]) + field.name.encode()
        if kind in (Field.TYPE_INT32, Field.TYPE_SINT32, Field.TYPE_SFIXED32):
            return -n
        if kind in (Field.TYPE_INT64, Field.TYPE_SINT64, Field.TYPE_SFIXED64):
            return -(n << 33)
        # Of more bits than the next smaller type holds, and each of another length as a varint.
        return (n << 33) + n if kind in (Field.TYPE_UINT64, Field.TYPE_FIXED64) else (n << 20) + n

    def one(self, message, field, variant: int) -> None:
        if is_map(field):
            key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            for _ in range(2):
                getattr(message, field.name)[self.scalar(key)] = self.scalar(value)
        elif field.is_repeated:
            for _ in range(2):
                if is_message(field):
                    self.fill(getattr(message, field.name).add(), variant)
                else:
                    getattr(message, field.name).append(self.scalar(field))
        elif is_message(field):
            part = getattr(message, field.name)
            part.SetInParent()
            self.fill(part, variant)
        else:
            setattr(message, field.name, self.scalar(field))

    def fill(self, message, variant: int) -> None:
        descriptor = message.DESCRIPTOR
        if descriptor.full_name == "google.protobuf.Duration":
            self.count += 1
            message.seconds, message.nanos = self.count, self.count * 1000
            return
        for field in descriptor.fields:
            if oneof_of(field) is None:
                self.one(message, field, variant % case_variants(field))
        for oneof in descriptor.oneofs:
            if oneof_of(oneof.fields[0]) is None:
                continue
            left = variant % sum(case_variants(field) for field in oneof.fields)
            for field in oneof.fields:
                if left < case_variants(field):
                    self.cases += [field.name] if field.name not in self.cases else []
                    self.one(message, field, left)
                    break
                left -= case_variants(field)


def examples(schema: Schema) -> dict:
    """{file stem: message}: every root, once for each case of its oneofs."""
    made = {}
    for name in schema.roots():
        for variant in range(variants(schema.descriptor(name))):
            message, filler = schema.new(name), Filler()
            filler.fill(message, variant)
            stem = ".".join([name.rpartition(".")[2], *filler.cases])
            if stem in made:
                raise RuntimeError(f"two examples are called {stem}")
            made[stem] = message
    return made


def _fields(message) -> dict:
    synthetic = {i for i, oneof in enumerate(message.oneof_decl)
                 if any(field.proto3_optional and field.oneof_index == i for field in message.field)}
    out = {}
    for field in message.field:
        inside = field.HasField("oneof_index") and field.oneof_index not in synthetic
        out[field.number] = {
            "name": field.name, "type": Field.Type.Name(field.type), "type_name": field.type_name,
            "label": Field.Label.Name(field.label), "optional": field.proto3_optional, "packed": field.options.packed,
            "oneof": message.oneof_decl[field.oneof_index].name if inside else ""}
    return out


def _walk(files: descriptor_pb2.FileDescriptorSet):
    """({name: message}, {name: {number: value's name}}, {"Service/Method": signature}) of our package."""
    messages, enums, methods = {}, {}, {}

    def visit(prefix, message):
        name = f"{prefix}.{message.name}"
        messages[name] = message
        for part in message.nested_type:
            visit(name, part)
        for enum in message.enum_type:
            enums[f"{name}.{enum.name}"] = {value.number: value.name for value in enum.value}

    for file in files.file:
        if file.package != PACKAGE:
            continue
        for message in file.message_type:
            visit(PACKAGE, message)
        for enum in file.enum_type:
            enums[f"{PACKAGE}.{enum.name}"] = {value.number: value.name for value in enum.value}
        for service in file.service:
            for method in service.method:
                methods[f"{PACKAGE}.{service.name}/{method.name}"] = (
                    method.input_type, method.output_type, method.client_streaming, method.server_streaming)
    return messages, enums, methods


def breaking_changes(old: descriptor_pb2.FileDescriptorSet, new: descriptor_pb2.FileDescriptorSet) -> list:
    """What a peer or client of `old` would not understand of `new`, a line each. What was added is none."""
    (old_messages, old_enums, old_methods), (messages, enums, methods) = _walk(old), _walk(new)
    found = []
    for name, message in old_messages.items():
        if name not in messages:
            found.append(f"message {name} is gone")
            continue
        today = _fields(messages[name])
        for number, field in _fields(message).items():
            what = f"{name}.{field['name']} = {number}"
            if number not in today:
                found.append(f"field {what} is gone")
                continue
            found += [f"field {what}: {key} was {field[key] or 'none'}, is {today[number][key] or 'none'}"
                      for key in field if field[key] != today[number][key]]
    for name, values in old_enums.items():
        today = enums.get(name, {})
        found += [f"enum {name}: {number} was {value}, is {today.get(number, 'gone')}"
                  for number, value in values.items() if today.get(number) != value]
    for name, signature in old_methods.items():
        if methods.get(name) != signature:
            found.append(f"method {name} was {signature}, is {methods.get(name, 'gone')}")
    return found
