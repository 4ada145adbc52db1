"""Client of the Headwater prefill service.

    from headwater import Client

    with Client("127.0.0.1:7070", tokenizer="path/to/model") as client:
        result = client.prefill(text="Once upon a time")
        for token in client.generate(result, max_new_tokens=32):
            print(token.token_id)
        client.release(result)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwater.client import Client as Client
    from headwater.client import tls_credentials as tls_credentials
    from headwater.errors import HeadwaterError as HeadwaterError
    from headwater.results import (
        AttentionGroup as AttentionGroup,
        AttentionReport as AttentionReport,
        BatchItem as BatchItem,
        GeneratedToken as GeneratedToken,
        PlanCandidate as PlanCandidate,
        PlanExplanation as PlanExplanation,
        PrefillOptions as PrefillOptions,
        PrefillResult as PrefillResult,
        Progress as Progress,
    )

_HOMES = {
    "Client": "client",
    "tls_credentials": "client",
    "HeadwaterError": "errors",
    "AttentionGroup": "results",
    "AttentionReport": "results",
    "BatchItem": "results",
    "GeneratedToken": "results",
    "PlanCandidate": "results",
    "PlanExplanation": "results",
    "PrefillOptions": "results",
    "PrefillResult": "results",
    "Progress": "results",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    # Loaded on first use: headwater.chat alone needs neither gRPC nor the generated stubs.
    if name not in _HOMES:
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"headwater.{_HOMES[name]}"), name)
