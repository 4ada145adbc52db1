"""Errors of the service as Python exceptions."""

from typing import Mapping, Optional

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "headwater.v1"
_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class HeadwaterError(Exception):
    """A call or one item of a batch failed.

    code      gRPC status code, which says who must act
    reason    headwater.v1.ErrorReason without its prefix, e.g. "PROMPT_TOO_LONG"; "" where the service sent none
    message   what was wanted and what was got
    metadata  values and limits by name, as the service sent them
    retry_after_s  how long the service asks to wait, None where it does not say
    """

    def __init__(self, code: grpc.StatusCode, message: str, reason: str = "",
                 metadata: Optional[Mapping[str, str]] = None, retry_after_s: Optional[float] = None):
        super().__init__(f"{code.name}{f' [{reason}]' if reason else ''}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


def from_status(status: status_pb2.Status) -> HeadwaterError:
    """Turns a google.rpc.Status, as PrefillFailed carries it, into an exception."""
    reason, metadata, retry_after_s = "", {}, None
    for detail in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return HeadwaterError(code, status.message, reason, metadata, retry_after_s)


def from_rpc_error(error: grpc.RpcError) -> HeadwaterError:
    """Turns a failed call into an exception; details that do not parse are left out."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                status = status_pb2.Status.FromString(value)
            except Exception:  # the protobuf library's DecodeError has several homes
                break
            converted = from_status(status)
            if converted.code == error.code():
                return converted
    return HeadwaterError(error.code(), error.details() or "")
