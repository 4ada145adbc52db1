"""Synchronous client of a Headwater coordinator and of the decode nodes that its answers name.

Every call has a deadline: `timeout_s` of the client unless the call is given its own. Errors are HeadwaterError.
A prefill is retried when the coordinator cannot be reached (UNAVAILABLE) and only then: the request id makes the
repetition the same request, which the coordinator attaches to the one that runs already. Other calls are not retried.
"""

import random
import time
import uuid
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Union

import grpc

from headwater.chat import ChatTokenizer
from headwater.errors import HeadwaterError, from_rpc_error, from_status
from headwater.results import BatchItem, GeneratedToken, PrefillOptions, PrefillResult, Progress
from headwater.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)

DEFAULT_TIMEOUT_S = 3600.0
MAX_ATTEMPTS = 5
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
MAX_DECODE_CHANNELS = 16
_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20),
                    ("grpc.enable_retries", 0)]

OnProgress = Callable[[Progress], None]


def tls_credentials(cert: Union[str, Path], key: Union[str, Path], ca: Union[str, Path]) -> grpc.ChannelCredentials:
    """For Client(credentials=): PEM files of this client's certificate and key, and of the authorities that servers'
    certificates come from. They are read once: make a new client when they have been replaced."""
    return grpc.ssl_channel_credentials(Path(ca).read_bytes(), Path(key).read_bytes(), Path(cert).read_bytes())


class Client:
    """Connection to one coordinator. Thread-safe except for text and messages, which use the one tokenizer."""

    def __init__(self, address: str, *, tokenizer: Union[ChatTokenizer, str, Path, None] = None,
                 timeout_s: float = DEFAULT_TIMEOUT_S, max_attempts: int = MAX_ATTEMPTS,
                 credentials: Optional[grpc.ChannelCredentials] = None):
        """`tokenizer` (a model directory, or one made before) is needed for text and messages only. `credentials`:
        tls_credentials(), of the coordinator and of decode nodes, whose certificates must hold the host names or addresses
        that are dialled; without them connections are plaintext."""
        self._credentials = credentials
        self._channel = self._dial(address)
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._decode_channels: Dict[str, grpc.Channel] = {}
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        if tokenizer is None or isinstance(tokenizer, ChatTokenizer):
            self._tokenizer = tokenizer
        else:
            self._tokenizer = ChatTokenizer(tokenizer)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is under way and closes the connections."""
        self._channel.close()
        for channel in self._decode_channels.values():
            channel.close()
        self._decode_channels.clear()

    def prefill(self, token_ids: Optional[Sequence[int]] = None, *, text: Optional[str] = None,
                messages: Optional[Sequence[Mapping]] = None, options: PrefillOptions = PrefillOptions(),
                request_id: Optional[str] = None, on_progress: Optional[OnProgress] = None,
                timeout_s: Optional[float] = None, traceparent: Optional[str] = None) -> PrefillResult:
        """Prefills one prompt: token ids, plain text, or chat messages, and waits for its end.

        on_progress is called in this thread, first when the request is accepted. Leaving by an exception cancels the call.
        traceparent: of the caller's span (W3C Trace Context); without it the service begins a trace.
        """
        ids = self._tokens(token_ids, text, messages)
        request = options.to_request(request_id or uuid.uuid4().hex, ids)
        end = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        attempt = 1
        while True:
            try:
                return self._prefill_once(request, on_progress, end, traceparent)
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            pause = self._backoff(attempt, error)
            if error.code != grpc.StatusCode.UNAVAILABLE or attempt >= self._max_attempts or \
                    time.monotonic() + pause >= end:
                raise error
            time.sleep(pause)
            attempt += 1

    def batch(self, prompts: Sequence[Sequence[int]], *, options: PrefillOptions = PrefillOptions(),
              request_ids: Optional[Sequence[str]] = None,
              on_progress: Optional[Callable[[int, Progress], None]] = None,
              timeout_s: Optional[float] = None) -> Iterator[BatchItem]:
        """Prefills many prompts; yields each one's end as it comes. Items fail on their own, the call fails by raising."""
        if request_ids is None:
            request_ids = [uuid.uuid4().hex for _ in prompts]
        if len(request_ids) != len(prompts):
            raise ValueError(f"{len(request_ids)} request ids for {len(prompts)} prompts")
        items = [options.to_request(request_id, ids) for request_id, ids in zip(request_ids, prompts)]
        call = self._prefill.BatchPrefill(prefill_pb2.BatchPrefillRequest(items=items), timeout=self._limit(timeout_s))
        try:
            for response in call:
                ended = self._event(response.response, on_progress and (lambda p: on_progress(response.item, p)))
                if ended is not None:
                    yield BatchItem(response.item, ended)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    def generate(self, result: PrefillResult, max_new_tokens: int, *, stop_token_ids: Sequence[int] = (),
                 timeout_s: Optional[float] = None) -> Iterator[GeneratedToken]:
        """Streams the continuation from the decode node that holds the cache; the first token is the prefill's."""
        stub = decode_pb2_grpc.DecodeServiceStub(self._decode_channel(result.decode_address))
        request = decode_pb2.GenerateRequest(session_id=result.session_id, max_new_tokens=max_new_tokens,
                                             stop_token_ids=stop_token_ids)
        call = stub.Generate(request, timeout=self._limit(timeout_s))
        try:
            for response in call:
                yield GeneratedToken.from_response(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    def release(self, result: PrefillResult, *, timeout_s: Optional[float] = None) -> int:
        """Frees the cache at the decode node; returns the bytes reclaimed, 0 where it was gone already."""
        stub = decode_pb2_grpc.DecodeServiceStub(self._decode_channel(result.decode_address))
        request = decode_pb2.ReleaseRequest(session_id=result.session_id)
        return self._unary(stub.Release, request, timeout_s).bytes_reclaimed

    def submit(self, token_ids: Optional[Sequence[int]] = None, *, text: Optional[str] = None,
               messages: Optional[Sequence[Mapping]] = None, options: PrefillOptions = PrefillOptions(),
               request_id: Optional[str] = None, timeout_s: Optional[float] = None,
               traceparent: Optional[str] = None) -> str:
        """Starts a prefill that goes on although nobody watches it; returns its id once it is accepted. See watch()."""
        request = options.to_request(request_id or uuid.uuid4().hex, self._tokens(token_ids, text, messages))
        metadata = [("traceparent", traceparent)] if traceparent else None
        return self._unary(lambda message, timeout: self._prefill.SubmitPrefill(message, timeout=timeout, metadata=metadata),
                           prefill_pb2.SubmitPrefillRequest(request=request), timeout_s).request_id

    def watch(self, request_id: str, *, tenant: str = "", on_progress: Optional[OnProgress] = None,
              timeout_s: Optional[float] = None) -> PrefillResult:
        """Waits for the end of a request that another call, or submit(), has started. Leaving by an exception leaves one of
        submit() running. NOT_FOUND: it is not known, or ended over ten minutes ago."""
        call = self._prefill.WatchPrefill(prefill_pb2.WatchPrefillRequest(request_id=request_id, tenant=tenant),
                                          timeout=self._limit(timeout_s))
        try:
            for message in call:
                ended = self._event(message.response, on_progress)
                if isinstance(ended, HeadwaterError):
                    raise ended
                if ended is not None:
                    return ended
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()
        raise HeadwaterError(grpc.StatusCode.INTERNAL, f"the event stream of request {request_id} ended without a result")

    def status(self, request_id: str, *, tenant: str = "",
               timeout_s: Optional[float] = None) -> Union[Progress, PrefillResult, HeadwaterError, None]:
        """How far a request is: its progress, its result, or the error that it ended with (not raised). None: it waits for
        workers of its model. NOT_FOUND as watch()."""
        request = prefill_pb2.GetPrefillRequest(request_id=request_id, tenant=tenant)
        response = self._unary(self._prefill.GetPrefill, request, timeout_s)
        progress: List[Progress] = []
        ended = self._event(response.last, progress.append)
        return ended if ended is not None else progress[0] if progress else None

    def cancel(self, request_id: str, *, tenant: str = "", timeout_s: Optional[float] = None) -> bool:
        """Cancels a request (tenant as in the request: ids are names within a tenant); True once compute has stopped
        and its blocks are reclaimed, False where it had ended."""
        request = prefill_pb2.CancelPrefillRequest(request_id=request_id, tenant=tenant)
        return self._unary(self._prefill.CancelPrefill, request, timeout_s).cancelled

    def workers(self, *, timeout_s: Optional[float] = None) -> List[admin_pb2.WorkerSummary]:
        return list(self._unary(self._admin.ListWorkers, admin_pb2.ListWorkersRequest(), timeout_s).workers)

    def decode_nodes(self, *, timeout_s: Optional[float] = None) -> List[admin_pb2.DecodeNodeSummary]:
        request = admin_pb2.ListDecodeNodesRequest()
        return list(self._unary(self._admin.ListDecodeNodes, request, timeout_s).decode_nodes)

    def _tokens(self, token_ids, text, messages) -> Sequence[int]:
        if sum(given is not None for given in (token_ids, text, messages)) != 1:
            raise ValueError("give exactly one of token_ids, text and messages")
        if token_ids is not None:
            return token_ids
        if self._tokenizer is None:
            raise ValueError("text and messages need Client(..., tokenizer=MODEL_DIR)")
        return self._tokenizer.encode_text(text) if text is not None else self._tokenizer.encode_chat(messages)

    def _prefill_once(self, request, on_progress, end: float, traceparent: Optional[str]) -> PrefillResult:
        metadata = [("traceparent", traceparent)] if traceparent else None
        call = self._prefill.Prefill(request, timeout=max(0.0, end - time.monotonic()), metadata=metadata)
        try:
            for response in call:
                ended = self._event(response, on_progress)
                if isinstance(ended, HeadwaterError):
                    raise ended
                if ended is not None:
                    return ended
        finally:
            call.cancel()
        raise HeadwaterError(grpc.StatusCode.INTERNAL, f"the event stream of request {request.request_id} ended without a result")

    @staticmethod
    def _event(response, on_progress: Optional[OnProgress]) -> Union[PrefillResult, HeadwaterError, None]:
        """Reports accepted and progress events; returns the result or error of a terminal one."""
        kind = response.WhichOneof("event")
        if kind == "completed":
            return PrefillResult.from_completed(response.completed)
        if kind == "failed":
            return from_status(response.failed.error)
        if on_progress is not None and kind == "accepted":
            on_progress(Progress.from_accepted(response.accepted))
        elif on_progress is not None and kind == "progress":
            on_progress(Progress.from_progress(response.progress))
        return None

    @staticmethod
    def _backoff(attempt: int, error: HeadwaterError) -> float:
        if error.retry_after_s is not None:
            return error.retry_after_s
        return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)

    def _unary(self, method, request, timeout_s: Optional[float]):
        try:
            return method(request, timeout=self._limit(timeout_s))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _limit(self, timeout_s: Optional[float]) -> float:
        return self._timeout_s if timeout_s is None else timeout_s

    def _dial(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        return grpc.secure_channel(address, self._credentials, options=_CHANNEL_OPTIONS)

    def _decode_channel(self, address: str) -> grpc.Channel:
        channel = self._decode_channels.get(address)
        if channel is None:
            if len(self._decode_channels) >= MAX_DECODE_CHANNELS:
                self._decode_channels.pop(next(iter(self._decode_channels))).close()
            channel = self._decode_channels[address] = self._dial(address)
        return channel
