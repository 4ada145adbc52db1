#!/usr/bin/env python3
"""Prefills a prompt on a running cluster and lets the decode node go on from the cache.

    prefill.py 127.0.0.1:7070 --tokens 1,2,3,4 --max_new_tokens 8
    prefill.py 127.0.0.1:7070 --tokenizer MODEL_DIR --text "Once upon a time"
"""

import argparse
import sys

from headwater import Client, HeadwaterError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coordinator", help="HOST:PORT")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--tokens", help="token ids with commas between them")
    prompt.add_argument("--text", help="needs --tokenizer")
    parser.add_argument("--tokenizer", help="directory of the model that the cluster serves")
    parser.add_argument("--max_new_tokens", type=int, default=16)
    arguments = parser.parse_args()
    token_ids = [int(word) for word in arguments.tokens.split(",")] if arguments.tokens else None

    with Client(arguments.coordinator, tokenizer=arguments.tokenizer, timeout_s=300) as client:
        try:
            result = client.prefill(token_ids, text=arguments.text)
            print(f"prefilled {result.num_tokens} tokens on {', '.join(result.worker_ids)}: {result.kv_bytes} bytes of KV at "
                  f"{result.decode_node}")
            generated = [token.token_id for token in client.generate(result, max_new_tokens=arguments.max_new_tokens)]
            print("generated", *generated)
            print(f"released {client.release(result)} bytes")
        except HeadwaterError as error:
            print(f"{error.code.name} {error.reason}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
