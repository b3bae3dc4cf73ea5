"""Zoo: networks of torchvision, timm and transformers, partitioned at sampled cuts and compared with the whole network.

    python -m tests.bench.zoo --only "torchvision:*"
    python -m tests.bench.zoo --training

Takes hours. Each network is checked in a process that is forked for it, in one thread, and its result is one line
of the output file; networks that the file has already are left out. The last output is a table of results, and one of
refusals by reason.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.bench.harness.output import make_parser, print_json, print_table
from tests.support.zoo.checks import Result, check_network, check_training
from tests.support.zoo.networks import Network, networks, training_networks

TIMEOUT_S = 7200.0


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names, such as 'timm:resnet*'")
    parser.add_argument("--training", action="store_true", help="train 50 networks in three parts instead")
    parser.add_argument("--output", type=Path, help="(default runs/zoo.jsonl or runs/zoo-training.jsonl)")
    options = parser.parse_args()
    check, population, output = check_network, networks(), Path("runs/zoo.jsonl")
    if options.training:
        check, population, output = check_training, training_networks(), Path("runs/zoo-training.jsonl")
    output = options.output or output
    chosen = [network for network in population if any(fnmatch(network.name, each) for each in options.only)]
    output.parent.mkdir(parents=True, exist_ok=True)
    results = {result.name: result for result in _read(output)}
    for network in chosen:
        if network.name not in results:
            result = results[network.name] = run_in_process(check, network)
            print(f"{result.outcome:10} {result.name} {result.detail}", flush=True)
            with output.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    print_tables([results[network.name] for network in chosen])
    print_json(options, {"rows": [asdict(results[network.name]) for network in chosen]})


def run_in_process(check: Callable[[Network], Result], network: Network) -> Result:
    """Check a network in a forked process, so that its memory is freed and its failure is only a result."""
    context = multiprocessing.get_context("fork")  # the imports of the networks take ten seconds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(check, network, sender), name=network.name)
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_S):
            return Result(network.name, "failed", f"no result after {TIMEOUT_S:.0f} s")
        result: Result = receiver.recv()
        return result
    except EOFError:
        process.join()
        return Result(network.name, "failed", f"its process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _check(check: Callable[[Network], Result], network: Network, sender: Connection) -> None:
    torch.set_num_threads(1)
    try:
        result = check(network)
    except Exception as error:  # noqa: BLE001 - any failure of a network is a result
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}: {last.line}"
        result = Result(network.name, "failed", f"{type(error).__name__}: {error} ({place})")
    sender.send(result)


def print_tables(results: Sequence[Result]) -> None:
    outcomes = Counter((result.name.partition(":")[0], result.outcome) for result in results)
    rows = [
        {"library": library, "result": outcome, "n": count} for (library, outcome), count in sorted(outcomes.items())
    ]
    print_table(
        f"{len(results)} networks", {"library": ("library", ""), "result": ("result", ""), "networks": ("n", "d")}, rows
    )
    reasons = Counter(_general(result.detail) for result in results if result.outcome == "refused")
    rows = [{"reason": reason, "n": count} for reason, count in reasons.most_common()]
    print_table("Refusals", {"networks": ("n", "d"), "reason": ("reason", "")}, rows)


def _general(reason: str) -> str:
    """Replace the names and numbers in a reason, which differ between networks of one kind."""
    without_advice = reason.partition(";")[0]
    return re.sub(r"'[^']*'|\btrace \w+|\d+", "...", without_advice)


def _read(path: Path) -> list[Result]:
    with suppress(FileNotFoundError):
        return [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return []


if __name__ == "__main__":
    main()
