"""Generates headwater/v1 (messages and stubs) from ../proto while the package is built."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PROTO = HERE.parent / "proto"


class BuildWithStubs(build_py):
    def run(self):
        super().run()
        self.generate(HERE if self.editable_mode else Path(self.build_lib))

    @staticmethod
    def generate(output: Path) -> None:
        import grpc_tools
        from grpc_tools import protoc
        from google.rpc import status_pb2

        sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("headwater/v1/*.proto"))
        if not sources:
            raise RuntimeError(f"no protos in {PROTO}: install from the source tree (pip install ./python)")
        # google/rpc comes from googleapis-common-protos, google/protobuf from grpcio-tools.
        includes = [PROTO, Path(status_pb2.__file__).parents[2], Path(grpc_tools.__file__).parent / "_proto"]
        arguments = ["protoc", *(f"-I{include}" for include in includes),
                     f"--python_out={output}", f"--pyi_out={output}", f"--grpc_python_out={output}", *sources]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc failed")
        (output / "headwater" / "v1" / "__init__.py").touch()


setup(cmdclass={"build_py": BuildWithStubs})
