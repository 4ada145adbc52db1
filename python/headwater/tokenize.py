"""Prints the token ids of a prompt, one line of numbers, for `headwater submit --tokens=-`.

    python -m headwater.tokenize MODEL_DIR TEXT.txt [--question "..."] [--max_document_tokens N]

The text goes in as it is; with --question it becomes a chat's user message, followed by the question. TEXT.txt may be -.
"""

import argparse
import sys
from pathlib import Path

from headwater.chat import ChatError, ChatTokenizer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m headwater.tokenize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("text", metavar="TEXT.txt")
    parser.add_argument("--question", help="apply the chat template: the text, an empty line, this question")
    parser.add_argument("--max_document_tokens", type=int, default=1 << 22, help="cut the text to its first tokens")
    arguments = parser.parse_args()
    try:
        tokenizer = ChatTokenizer(arguments.model)
        text = sys.stdin.read() if arguments.text == "-" else Path(arguments.text).read_text(encoding="utf-8")
        if arguments.question is None:
            ids = tokenizer.encode_text(text)[:arguments.max_document_tokens]
        else:
            ids = tokenizer.document_prompt(text, arguments.question, arguments.max_document_tokens)
    except (ChatError, OSError, UnicodeDecodeError) as error:
        print(f"headwater.tokenize: {error}", file=sys.stderr)
        return 1
    print(*ids)
    return 0


if __name__ == "__main__":
    sys.exit(main())
