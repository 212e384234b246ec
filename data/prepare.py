"""Encode texts of any size into one file of GPT-2's token ids, which v8b and later train on.

Run it:   python -m data.prepare novel.txt letters.txt --out corpus.bin
          python part4_gpt2/v8b_gpt2_tokens.py --data corpus.bin

A file of ids from elsewhere, as nanoGPT's scripts write them, only needs a description:
          python -m data.prepare --adopt train.bin
"""

import argparse
from pathlib import Path

from data import token_files
from data.flags import InputError, Parser, command_line


def main(argv: list[str] | None = None) -> None:
    """Write the file that the flags ask for. argv: by default those of the command line."""
    with command_line():
        parser = Parser(
            prog="python -m data.prepare", description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument("texts", nargs="*", type=Path, metavar="TEXT", help="UTF-8 text files")
        parser.add_argument("--out", type=Path, help="the file to write; its name ends with .bin")
        parser.add_argument("--adopt", type=Path, help="a file of token ids, to describe it only")
        args = parser.parse_args(argv)
        if args.adopt:
            if args.texts or args.out:
                raise InputError("--adopt: takes no texts and no --out; leave them out")
            n_tokens = token_files.adopt(args.adopt, "--adopt")
            print(f"{token_files.side_file(args.adopt)}: describes {n_tokens:,} tokens")
            return
        if not args.texts or not args.out:
            raise InputError("name the texts and the file to write: TEXT... --out corpus.bin")
        if args.out.suffix != ".bin":
            raise InputError(f"--out {args.out}: its name must end with .bin")
        if args.out.exists():
            raise InputError(f"--out {args.out}: is there already; remove it, or name another")
        for text in args.texts:
            if text.is_file() and text.stat().st_size == 0:
                raise InputError(f"TEXT {text}: the file is empty; give a text")
        n_tokens = token_files.write_token_file(args.out, args.texts, "--out", "TEXT")
        print(f"{args.out}: {n_tokens:,} tokens")


if __name__ == "__main__":
    main()
