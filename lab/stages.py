"""Runs a list of this repository's commands one after the other. Started again, it goes on where it was stopped."""
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from runs import UserError


@dataclass
class Stage:
    """A command and what it leaves."""
    name: str
    line: list                    # a module and its arguments: ["linearsr.train", "--stage", "experts", …]
    leaves: Path | None = None    # it is there once the stage is done; None: the command itself sees what is left to do
    resume: Path | None = None    # where this file exists, the command is given --resume
    hours: float = 0.0            # an estimate; 0 for none


def run(stages):
    """Run the stages that are not done; first print them and the estimate of hours.

    Raises KeyboardInterrupt where a stage was stopped, UserError for another exit code or where it left nothing.
    """
    todo = [stage for stage in stages if not (stage.leaves and stage.leaves.exists())]
    hours = sum(stage.hours for stage in todo)
    print(f"{len(todo)} of {len(stages)} stages to run" + f", about {hours:.1f} hours" * bool(hours))
    for stage in todo:
        print(f"  {stage.name}" + f", about {stage.hours:.1f} hours" * bool(stage.hours))
    for stage in todo:
        module, *line = map(str, stage.line)
        line += ["--resume"] * bool(stage.resume and stage.resume.exists())
        print(f"{stage.name}: python -m {shlex.join([module, *line])}", flush=True)
        if code := import_module(module).main(line):
            raise KeyboardInterrupt if code > 128 else UserError(f"{stage.name}: exit code {code}")
        if stage.leaves and not stage.leaves.exists():
            raise UserError(f"{stage.name} did not leave {stage.leaves}")
