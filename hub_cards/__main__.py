"""Publish a Mimi on the Hub, whole or not at all.

    python -m hub_cards card DIR                          # the model card, as it would be
    python -m hub_cards publish DIR OWNER/NAME --dry-run  # what would go up, and what would be refused
    python -m hub_cards publish DIR OWNER/NAME            # in one commit; again, and only what changed goes up

DIR is a model directory, or a folder of a training run. The token is that of `hf auth login`, or HF_TOKEN.
Exit codes: 0 if all is published, 2 if nothing is, 130 after Ctrl-C.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token

from hub_cards.card import CardError, dataset_card, metric_card, model_card
from hub_cards.publish import Change, PublishError, Target, compare, fetch, publish
from hub_cards.scan import scan

CARDS = {"model": model_card, "dataset": dataset_card, "space": metric_card}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except (CardError, PublishError, OSError) as error:
        print(f"hub_cards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hub_cards: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m hub_cards", description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = _publish.__doc__
    add = commands.add_parser("publish", help=text, description=text)
    add.set_defaults(command=_publish)
    add.add_argument("directory", type=Path, metavar="DIR", help="what to publish")
    add.add_argument("repo", metavar="OWNER/NAME", help="where to; made if it is missing")
    add.add_argument("--revision", default="main", metavar="BRANCH", help="default: main; made if it is missing")
    add.add_argument("--private", action="store_true", help="for the owner's eyes only, if it is made now")
    add.add_argument("--create-pr", action="store_true", help="propose the changes instead of making them")
    add.add_argument("--native", action="store_true", help="add Kyutai's format, for moshi, Rust and MLX")
    add.add_argument("--message", default="Publish with open Mimi", metavar="TEXT", help="of the commit")
    add.add_argument("--dry-run", action="store_true", help="show what would go up, and send nothing")
    text = _card.__doc__
    card = commands.add_parser("card", help=text, description=text)
    card.set_defaults(command=_card)
    card.add_argument("directory", type=Path, metavar="DIR", help="as of publish")
    for command in (add, card):
        command.add_argument("--repo-type", choices=tuple(CARDS), default="model", help="default: model")
    card.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: print it)")
    return parser


def _publish(args: argparse.Namespace) -> int:
    """Publish a model with its code, card, results and samples; or a data set or a Space."""
    if args.create_pr and args.revision != "main":
        raise PublishError("--create-pr proposes changes to main, so it goes without --revision.")
    if args.native and args.repo_type != "model":
        raise PublishError("--native is for models.")
    from hub_cards.stage import stage_files, stage_model  # after parsing: PyTorch takes its time

    target = Target(args.repo, args.repo_type, args.revision, args.private, args.create_pr)
    with tempfile.TemporaryDirectory(prefix="publish-") as name:
        staged = Path(name)
        if args.repo_type == "model":
            for note in stage_model(args.directory, staged, args.repo, args.native):
                print(f"hub_cards: {note}", file=sys.stderr)
        else:
            stage_files(args.directory, staged, args.repo, args.repo_type)
        findings = scan(staged, known=[get_token() or ""])
        if args.dry_run:
            print(_table(staged, target))
        if findings:
            refused = "\n".join(f"  {finding}" for finding in findings)
            raise PublishError(f"this must not be published, so nothing is:\n{refused}")
        if args.dry_run:
            return 0
        address, changes = publish(staged, target, args.message, HfApi())
    counts = ", ".join(f"{sum(c.state == state for c in changes)} {state}" for state in ("new", "changed", "removed"))
    print(f"{address}: {counts}" if address else f"Nothing has changed: {target} is as it was.")
    return 0


def _table(staged: Path, target: Target) -> str:
    """What would go up, beside what is there if the Hub says."""
    try:
        remote, known = fetch(target, HfApi()), True
    except PublishError as error:
        print(f"hub_cards: what is on the Hub is not known. {error}", file=sys.stderr)
        remote, known = None, False
    rows = [_row(change, known) for change in compare(staged, remote, target)]
    return "\n".join([f"{'bytes':>12}  {'LFS':3}  {'state':7}  path", *rows])


def _row(change: Change, known: bool) -> str:
    lfs, state = "LFS" if change.lfs else "", change.state if known else "?"
    return f"{change.size:12,}  {lfs:3}  {state:7}  {change.path}"


def _card(args: argparse.Namespace) -> int:
    """Render a card from what training, evaluation and tokenization wrote."""
    text = str(CARDS[args.repo_type](args.directory))
    if args.output is None:
        print(text)
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(f".{args.output.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
