"""The commands of mos_kernels. `python -m mos_kernels COMMAND --help` lists the options of a command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mos_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    doctor = command("doctor", "say which backend runs on this machine and why, and check its results")
    doctor.add_argument("--model", type=Path, help="check this adapter's folder instead: name the parts without effect")
    doctor.add_argument("--base", help="the base model of --model; needed if the adapter does not name it")
    command("finetune", "train a classifier or a language model, with MoS or with a baseline such as a LoRA")
    command("export-lora", "write the plain LoRA nearest to an adapter; it can be merged, and served anywhere")
    report = command("report", "draw a run as one HTML page: loss, curvature and routing")
    report.add_argument("run", type=Path, help="the output folder of finetune, a Trainer's output_dir, or a checkpoint")
    report.add_argument("--output", type=Path, help="where to write the page (default: report.html in that folder)")
    kernels = command("kernels", "list the registers and shared memory of the compiled Triton kernels; needs no GPU")
    kernels.add_argument("architectures", nargs="*", help="such as sm_90 or gfx942 (default: all that are supported)")
    kernels.add_argument(
        "--counts",
        action="store_true",
        help="execute them on the CPU instead, and count instructions, sectors and bank conflicts; for NVIDIA only, in "
        "a clone of the repository, with g++",
    )
    tune = command("tune", "time launch settings of the Triton kernels on this GPU, and store the best")
    tune.add_argument("kernels", nargs="*", help="such as shrink or expand (default: all)")
    tune.add_argument(
        "--buckets",
        nargs="+",
        choices=("train", "decode"),
        default=[],
        help="decode: at most 64 tokens; train: more (default: both)",
    )
    tune.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of x (default: bfloat16)"
    )
    tune.add_argument("--dry-run", action="store_true", help="print the settings found, and write nothing")

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names and signs that the terminal's encoding lacks
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["finetune"], ["export-lora"]):  # their options need transformers; the other commands' none
        try:
            from mos_kernels.finetune import export
            from mos_kernels.finetune import run as run_finetune
        except ModuleNotFoundError as error:
            print(f"error: {arguments[0]} needs {error.name}: pip install 'mos_kernels[finetune]'", file=sys.stderr)
            return 2
        return (run_finetune if arguments[0] == "finetune" else export.run)(arguments[1:])
    options = parser.parse_args(arguments)
    if options.command == "doctor" and options.base is not None and options.model is None:
        parser.error("--base has no effect here: give --model")
    if options.command == "doctor" and options.model is not None:
        from mos_kernels.huggingface.participation import run as check

        return check(options.model, options.base)
    if options.command == "doctor":
        from mos_kernels.doctor import run

        return run()
    if options.command == "report":
        from mos_kernels.run_report import run as draw

        return draw(options.run, options.output)
    if options.command == "tune":
        import torch

        from mos_kernels.backends.triton.tune import run as run_tuner

        return run_tuner(options.kernels, options.buckets, getattr(torch, options.dtype), options.dry_run)
    return (_counts if options.counts else _kernels)(options.architectures)


def _kernels(architectures: list[str]) -> int:
    from mos_kernels.backends.triton import compiled

    unknown = sorted(set(architectures) - set(compiled.TARGETS))
    if unknown:
        print(f"error: unknown architectures {unknown}: choose from {sorted(compiled.TARGETS)}", file=sys.stderr)
        return 2
    print(compiled.table(architectures or compiled.TARGETS))
    return 0


def _counts(architectures: list[str]) -> int:
    try:
        from tests.emulator import counts
    except ModuleNotFoundError as error:
        if error.name not in ("tests", "tests.emulator"):
            raise
        print("error: --counts needs tests/emulator: run it in the root of a checkout of mos_kernels", file=sys.stderr)
        return 2
    return counts.main([*architectures, "--lines"])


if __name__ == "__main__":
    sys.exit(main())
