"""Tests that today's protos read and write what earlier versions put on the wire, and that the check of that finds breaks."""

import contextlib
import copy
import io
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

try:
    import grpc_tools  # noqa: F401
    from google.protobuf import descriptor_pb2, text_format, unknown_fields
    from google.rpc import status_pb2  # noqa: F401
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit(77)

import kv_frames  # noqa: E402
import make_wire_golden  # noqa: E402
from wire_schema import Field, Schema, breaking_changes, compile_protos, examples, is_map  # noqa: E402

GOLDEN = ROOT / "tests/proto/golden"
TODAY = Schema(compile_protos())
# Of every message of ours, in descriptors of a time to come.
FUTURE_FIELDS = (("later_number", 1901, Field.TYPE_UINT64), ("later_text", 1902, Field.TYPE_STRING),
                 ("later_fixed", 1903, Field.TYPE_FIXED32), ("later_real", 1904, Field.TYPE_DOUBLE))


def versions():
    return sorted(folder for folder in GOLDEN.iterdir() if folder.is_dir())


def schema_of(folder: Path) -> Schema:
    return Schema(descriptor_pb2.FileDescriptorSet.FromString((folder / "descriptors.binpb").read_bytes()))


def messages_of(folder: Path):
    """(stem, message's full name, bytes, text) of each golden message."""
    for path in sorted(folder.glob("*.binpb")):
        if path.name != "descriptors.binpb":
            name = f"headwater.v1.{path.name.split('.')[0]}"
            yield path.stem, name, path.read_bytes(), path.with_suffix(".txtpb").read_text(encoding="utf-8")


def walk(message):
    """The message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None and not is_map(field):
            for part in value if field.is_repeated else [value]:
                yield from walk(part)


def unknown_in(message) -> list:
    return [f"{part.DESCRIPTOR.name} has unknown field {unknown.field_number}"
            for part in walk(message) for unknown in unknown_fields.UnknownFieldSet(part)]


def problems(schema: Schema, name: str, data: bytes, text: str) -> list:
    """Why `schema` does not read `data` as `text`, and write it so again; empty: it does."""
    try:
        message = schema.new(name)
    except KeyError:
        return [f"{name} is gone"]
    message.ParseFromString(data)
    found = unknown_in(message)
    if text_format.MessageToString(message) != text:
        found.append(f"{name} reads as\n{text_format.MessageToString(message)}and not as\n{text}")
    if message.SerializeToString(deterministic=True) != data:
        found.append(f"{name} is written with other bytes")
    return found


def altered(change, files=None):
    """A copy of descriptors (today's) with `change(message by name)` made to it."""
    made = copy.deepcopy(files or TODAY.files)
    ours = [file for file in made.file if file.package == "headwater.v1"]
    change({part.name: part for file in ours for part in (*file.message_type, *file.enum_type, *file.service)})
    return made


def field_of(message, name):
    return next(field for field in message.field if field.name == name)


def with_future_fields(schema: Schema) -> Schema:
    def add(parts):
        for message in parts.values():
            if isinstance(message, descriptor_pb2.DescriptorProto):
                for name, number, kind in FUTURE_FIELDS:
                    message.field.add(name=name, number=number, type=kind, label=Field.LABEL_OPTIONAL)
    return Schema(altered(add, schema.files))


def differing(old, new, path="") -> list:
    """Fields that `old`'s descriptor knows and that have another value in `new`."""
    found = []
    for field in old.DESCRIPTOR.fields:
        if field.name not in new.DESCRIPTOR.fields_by_name:
            found.append(f"{path}.{field.name}")
            continue
        where, a, b = f"{path}.{field.name}", getattr(old, field.name), getattr(new, field.name)
        if is_map(field):
            found += [] if dict(a) == dict(b) else [where]
        elif field.message_type is None:
            found += [] if (list(a) == list(b) if field.is_repeated else a == b) else [where]
        elif field.is_repeated:
            found += [] if len(a) == len(b) else [where]
            found += [difference for one, other in zip(a, b) for difference in differing(one, other, where)]
        elif old.HasField(field.name) != new.HasField(field.name):
            found.append(where)
        elif old.HasField(field.name):
            found += differing(a, b, where)
    return found


class GoldenTest(unittest.TestCase):
    def each(self):
        self.assertTrue(versions(), "no version is committed")
        for folder in versions():
            for stem, name, data, text in messages_of(folder):
                yield f"{folder.name}/{stem}", name, data, text

    def test_todays_protos_read_and_write_what_was_recorded(self):
        for file, name, data, text in self.each():
            with self.subTest(file):
                self.assertEqual(problems(TODAY, name, data, text), [])

    def test_fields_of_a_later_version_leave_the_known_ones_as_they_are_and_are_kept(self):
        later = with_future_fields(TODAY)
        for file, name, data, text in self.each():
            sent = later.new(name)
            sent.ParseFromString(data)
            for part in walk(sent):
                if part.DESCRIPTOR.full_name.startswith("headwater."):
                    part.later_number, part.later_text, part.later_fixed, part.later_real = 1 << 40, "later", 7, 0.5
            got = TODAY.new(name)
            got.ParseFromString(sent.SerializeToString())
            self.assertGreaterEqual(len(unknown_in(got)), len(FUTURE_FIELDS), file)
            self.assertEqual(differing(got, sent), [], file)
            passed_on = later.new(name)
            passed_on.ParseFromString(got.SerializeToString())
            self.assertEqual(passed_on, sent, file)
            got.DiscardUnknownFields()
            self.assertEqual(text_format.MessageToString(got), text, file)
            self.assertEqual(got.SerializeToString(deterministic=True), data, file)

    def test_a_version_reads_what_todays_protos_write(self):
        for folder in versions():
            old = schema_of(folder)
            for stem, sent in examples(TODAY).items():
                name = sent.DESCRIPTOR.full_name
                if name not in old.roots():
                    continue
                with self.subTest(version=folder.name, message=stem):
                    got = old.new(name)
                    got.ParseFromString(sent.SerializeToString())
                    self.assertEqual(differing(got, sent), [])

    def test_nothing_that_a_version_had_was_changed(self):
        for folder in versions():
            with self.subTest(version=folder.name):
                self.assertEqual(breaking_changes(schema_of(folder).files, TODAY.files), [])


class RecordedTest(unittest.TestCase):
    """What is committed is all that a version had."""

    def test_every_field_of_every_message_is_set_in_some_file(self):
        for folder in versions():
            schema, seen = schema_of(folder), set()
            recorded = list(messages_of(folder))
            self.assertEqual({name for _, name, _, _ in recorded}, set(schema.roots()))
            for _, name, data, _ in recorded:
                message = schema.new(name)
                message.ParseFromString(data)
                seen |= {field.full_name for part in walk(message) for field, _ in part.ListFields()}
            all_fields = {field.full_name for file in schema.files.file if file.package == "headwater.v1"
                          for message in file.message_type
                          for field in schema.descriptor(f"headwater.v1.{message.name}").fields}
            self.assertEqual(all_fields - seen, set())

    def test_no_number_or_text_is_in_a_file_twice(self):
        for folder in versions():
            schema = schema_of(folder)
            for stem, name, data, _ in messages_of(folder):
                message, values = schema.new(name), []
                message.ParseFromString(data)
                for part in walk(message):
                    for field, value in part.ListFields():
                        if field.message_type is None and field.type not in (Field.TYPE_BOOL, Field.TYPE_ENUM):
                            values += list(value) if field.is_repeated else [value]
                self.assertEqual(len(values), len(set(values)), stem)

    def test_services_roots_are_those_that_cross_a_process_boundary(self):
        roots = TODAY.roots()
        self.assertGreaterEqual(set(roots), {f"headwater.v1.{name}" for name in (
            "PrefillRequest", "PrefillResponse", "ConnectRequest", "ConnectResponse", "KvFrameHeader", "RegisterRequest",
            "CommitSessionRequest", "GenerateResponse", "ListWorkersResponse", "RolePolicy", "GetResponse")})
        self.assertNotIn("headwater.v1.PrefillPlan", roots)


class FrameTest(unittest.TestCase):
    """tests/proto/handshake_test.py sends these to a decode node."""

    def test_recorded_frames_are_read_as_recorded(self):
        self.assertEqual(kv_frames.crc32c(b"123456789"), 0xE3069283)  # the check value of CRC-32C
        for folder in versions():
            frames = sorted(folder.glob("frame.*.bin"))
            self.assertGreaterEqual(len(frames), 15)
            for path in frames:
                header, payload = kv_frames.decode(TODAY, path.read_bytes())
                self.assertEqual(unknown_in(header), [])
                self.assertEqual(text_format.MessageToString(header), path.with_suffix(".txtpb").read_text())
                self.assertEqual(kv_frames.encode(header, payload), path.read_bytes())
                if header.HasField("block"):
                    self.assertEqual(kv_frames.crc32c(payload), header.block.crc32c)

    def test_another_frame_version_and_a_flipped_bit_are_found(self):
        data = (versions()[0] / "frame.hello.bin").read_bytes()
        header, _ = kv_frames.decode(TODAY, data)
        for bad in (kv_frames.encode(header, version=2), data[:20] + bytes([data[20] ^ 1]) + data[21:], data[:-1]):
            with self.assertRaises(ValueError):
                kv_frames.decode(TODAY, bad)


class CheckerTest(unittest.TestCase):
    """Altered descriptors: what the tests above would say if somebody changed the protos so."""

    def expect(self, change, *lines):
        self.assertCountEqual(breaking_changes(TODAY.files, altered(change)), lines)

    def read_with(self, change) -> list:
        """What v0.1's files are read as where today's protos are altered."""
        schema = Schema(altered(change))
        return [problem for _, name, data, text in messages_of(GOLDEN / "v0.1")
                for problem in problems(schema, name, data, text)]

    def test_a_removed_field(self):
        def remove(parts):
            parts["KvHello"].field.remove(field_of(parts["KvHello"], "rank"))
        self.expect(remove, "field headwater.v1.KvHello.rank = 4 is gone")
        self.assertIn("KvHello has unknown field 4", self.read_with(remove))

    def test_a_reused_number(self):
        def reuse(parts):
            parts["KvHello"].field.remove(field_of(parts["KvHello"], "rank"))
            parts["KvHello"].field.add(name="port", number=4, type=Field.TYPE_UINT32, label=Field.LABEL_OPTIONAL)
        self.expect(reuse, "field headwater.v1.KvHello.rank = 4: name was rank, is port")
        self.assertIn("port: ", "".join(self.read_with(reuse)))

    def test_a_changed_type(self):
        def change(parts):
            field_of(parts["KvHello"], "rank").type = Field.TYPE_SINT32  # the same wire type, another value
        self.expect(change, "field headwater.v1.KvHello.rank = 4: type was TYPE_UINT32, is TYPE_SINT32")
        self.assertTrue(any("reads as" in problem for problem in self.read_with(change)))

    def test_a_type_of_another_wire_type(self):
        def change(parts):
            field_of(parts["KvBlock"], "crc32c").type = Field.TYPE_UINT32
        self.expect(change, "field headwater.v1.KvBlock.crc32c = 8: type was TYPE_FIXED32, is TYPE_UINT32")
        self.assertIn("KvBlock has unknown field 8", self.read_with(change))

    def test_a_renumbered_field(self):
        def change(parts):
            field_of(parts["ReleaseRequest"], "session_id").number = 5
        self.expect(change, "field headwater.v1.ReleaseRequest.session_id = 1 is gone")
        self.assertIn("ReleaseRequest has unknown field 1", self.read_with(change))

    def test_a_field_that_became_repeated_or_optional_or_part_of_a_oneof(self):
        def change(parts):
            field_of(parts["KvHello"], "epoch").label = Field.LABEL_REPEATED
            parts["KvHello"].oneof_decl.add(name="who")
            field_of(parts["KvHello"], "session_id").oneof_index = 0
            parts["KvHello"].oneof_decl.add(name="_rank")
            field_of(parts["KvHello"], "rank").proto3_optional = True
            field_of(parts["KvHello"], "rank").oneof_index = 1
        self.expect(change, "field headwater.v1.KvHello.session_id = 1: oneof was none, is who",
                    "field headwater.v1.KvHello.epoch = 3: label was LABEL_OPTIONAL, is LABEL_REPEATED",
                    "field headwater.v1.KvHello.rank = 4: optional was none, is True")

    def test_enum_values(self):
        def change(parts):
            parts["KvDtype"].value[1].number, parts["KvDtype"].value[2].number = 2, 1
            parts["ErrorReason"].value.remove(parts["ErrorReason"].value[-1])
            parts["FinishReason"].value[1].name = "FINISH_REASON_LONG"
        gone = TODAY.pool.FindEnumTypeByName("headwater.v1.ErrorReason").values[-1]
        self.expect(change, "enum headwater.v1.FinishReason: 1 was FINISH_REASON_LENGTH, is FINISH_REASON_LONG",
                    f"enum headwater.v1.ErrorReason: {gone.number} was {gone.name}, is gone",
                    "enum headwater.v1.KvDtype: 1 was KV_DTYPE_F32, is KV_DTYPE_F16",
                    "enum headwater.v1.KvDtype: 2 was KV_DTYPE_F16, is KV_DTYPE_F32")

    def test_messages_and_methods(self):
        def change(parts):
            parts["ReleaseResponse"].name = "FreeResponse"
            release = next(method for method in parts["DecodeService"].method if method.name == "Release")
            release.output_type = ".headwater.v1.FreeResponse"
            parts["PrefillService"].method[0].server_streaming = False
            parts["AdminService"].method.remove(parts["AdminService"].method[0])
        self.assertCountEqual([line.partition(" was ")[0] for line in breaking_changes(TODAY.files, altered(change))], [
            "message headwater.v1.ReleaseResponse is gone", "method headwater.v1.AdminService/ListWorkers",
            "method headwater.v1.DecodeService/Release", "method headwater.v1.PrefillService/Prefill"])
        self.assertIn("headwater.v1.ReleaseResponse is gone", self.read_with(change))

    def test_what_is_new_is_no_break(self):
        def change(parts):
            parts["KvHello"].field.add(name="port", number=9, type=Field.TYPE_UINT32, label=Field.LABEL_OPTIONAL)
            parts["ConnectResponse"].field.add(name="later", number=90, type=Field.TYPE_MESSAGE, oneof_index=0,
                                               type_name=".headwater.v1.AbortAssignment", label=Field.LABEL_OPTIONAL)
            parts["KvDtype"].value.add(name="KV_DTYPE_F8", number=90)
            parts["AdminService"].method.add(name="Later", input_type=".headwater.v1.ListWorkersRequest",
                                             output_type=".headwater.v1.ListWorkersResponse")
        self.expect(change)
        self.assertEqual(self.read_with(change), [])


class GeneratorTest(unittest.TestCase):
    def run_main(self, *words) -> tuple:
        out, err = io.StringIO(), io.StringIO()
        with unittest.mock.patch.object(sys, "argv", ["make_wire_golden.py", *map(str, words)]), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                return make_wire_golden.main(), err.getvalue()
            except SystemExit as end:
                return end.code, err.getvalue()

    def test_it_writes_a_version_once_and_the_same_each_time(self):
        with tempfile.TemporaryDirectory() as folder:
            for version in ("v7.1", "v7.2"):
                self.assertEqual(self.run_main(version, "--golden", folder), (0, ""))
            one, two = ({path.name: path.read_bytes() for path in (Path(folder) / version).iterdir()}
                        for version in ("v7.1", "v7.2"))
            self.assertGreater(len(one), 100)
            self.assertEqual(one, two)
            stamp = Path(folder) / "v7.1/PrefillRequest.min_recall.decode_node.binpb"
            stamp.write_bytes(b"as it was")
            status, said = self.run_main("v7.1", "--golden", folder)
            self.assertEqual(status, 1)
            self.assertIn("is there already", said)
            self.assertEqual(stamp.read_bytes(), b"as it was")

    def test_a_version_has_two_numbers(self):
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(self.run_main("../v1.0", "--golden", folder)[0], 2)
            self.assertEqual(list(Path(folder).iterdir()), [])


if __name__ == "__main__":
    unittest.main()
