"""The command line. A command is one line of COMMANDS: a module with a `COMMAND` (runtime/command.py), or MODULE:METHOD.

A module of the same name in fastdiff/options holds the command's options and loads no torch. The module of the command itself is
imported only to run it, so help pages, completion, `--dry-run` and usage errors answer at once.
"""

import inspect
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import typer
from typer.core import TyperGroup

from fastdiff import __version__
from fastdiff.runtime import console
from fastdiff.runtime.command import Description, Runnable
from fastdiff.runtime.config import Option, options, preset, resolve, suggestion, to_toml
from fastdiff.runtime.errors import Result, Stopped, UsageError, device_error, with_flags
from fastdiff.runtime.requirements import check_torch
from fastdiff.runtime.secrets import hidden


class Command(NamedTuple):
    """One subcommand, known before its module is imported."""

    name: str
    place: str  # the module, or for a training method module:class
    help: str
    panel: str

    def describe(self) -> Description:
        """The options, presets and examples: from fastdiff/options, or from the module itself where that has its own."""
        options_module = f"fastdiff.options.{self.place.partition(':')[0].rpartition('.')[2]}"
        if find_spec(options_module):
            module = vars(import_module(options_module))
            return Description(module["Config"], module.get("PRESETS", {}), module["EXAMPLES"])
        work = self.load()
        return Description(work.Config, work.presets, work.examples)

    def load(self) -> Runnable:
        """Import the code that runs the command."""
        check_torch()
        module, _, method = self.place.partition(":")
        loaded = import_module(module, __package__)
        if not method:
            return loaded.COMMAND
        from fastdiff.commands import train

        return train.runnable(vars(loaded)[method])


COMMANDS = [
    Command("prune", ".methods.prune:Prune", "Cut a UNet to a small layout and train the loss away (BK-SDM, SDXS)", "Train"),
    Command("distill-vae", ".methods.vae:TinyVAE", "Train a tiny decoder for a checkpoint's VAE (SDXS, TAESD)", "Train"),
    Command("train-lcm-lora", ".methods.lcm:LCM", "Distil a few-step LoRA (LCM, PCM, TCD)", "Train"),
    Command("dmd", ".methods.dmd:DMD", "Distil a one-step or few-step model (DMD, DMD2)", "Train"),
    Command("sid", ".methods.sid:SiD", "Distil one step from prompts alone (SiD with long-short guidance)", "Train"),
    Command("tdm", ".methods.tdm:TDM", "Distil 4 steps from prompts alone (trajectory distribution matching)", "Train"),
    Command("lightning", ".methods.lightning:Lightning", "Distil 128 steps down to 1, stage by stage (SDXL-Lightning)", "Train"),
    Command("sdxs", ".methods.sdxs:SDXS", "Train a small network to draw in one step (SDXS)", "Train"),
    Command("distill-controlnet", ".methods.controlnet:DistilControlNet", "A ControlNet for a small network (SDXS)", "Train"),
    Command("merge-lora", ".commands.merge_lora", "Add LoRAs exactly, to a rank, or into a checkpoint", "Use"),
    Command("sample", ".commands.sample", "Draw images with the settings that the weights ask for", "Use"),
    Command("evaluate", ".commands.evaluate", "Judge few-step models on pictures against their teacher", "Use"),
    Command("bench", ".commands.bench", "Measure speed against the stock way, and the machine's limit", "Use"),
    Command("export", ".commands.export", "Write a checkpoint as folder or single file, a LoRA in another layout", "Use"),
    Command("inspect", ".commands.inspect", "Tell what a file is, what it fits and whether it is safe", "Use"),
]  # fmt: skip

# A prefix: `fastdiff plan COMMAND ...` takes that command's own options.
PLAN = Command("plan", ".commands.plan", "Tell memory, disk and hours of a training command on this machine", "Use")
PLANNED = [c.name for c in COMMANDS if c.panel == "Train"]

PACKAGE = Path(__file__).parent
HELP_ALL = "--help-all"
START = " ".join(
    (
        "Turn a Stable Diffusion checkpoint into a fast few-step model.\n\n[bold]Start here:[/bold]",
        "[cyan]fastdiff train-lcm-lora[/cyan] distils the small checkpoint that ships with fastdiff: no GPU, no download.",
        "With [cyan]--base model.safetensors[/cyan] it distils your own;",
        "[cyan]fastdiff plan train-lcm-lora --base model.safetensors[/cyan] first says whether that fits this machine.",
        "[cyan]fastdiff sample --lora FILE[/cyan] draws with the result.",
    )
)
SOURCES = "A command's own options are also variables (FASTDIFF_STEPS) and keys of --config FILE.toml; flags win."
# typer carries its own copy of click, or depends on it: either way its parser's errors are these.
PARSER_ERROR = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@dataclass
class Call:
    """A parsed command line, ready to run."""

    command: Command
    description: Description
    flags: dict[str, Any]  # of the config; None = not given
    json: bool = False
    config: Path | None = None
    dry_run: bool = False
    debug: bool = False
    offline: bool = False
    quiet: bool = False
    line: str = ""  # as it was typed, but for --json
    plan: bool = False  # tell what it would take, and do not run it
    probe: bool = True
    memory: str | None = None

    @cached_property
    def work(self) -> Runnable:
        """The code of the command; loads torch."""
        return self.command.load()


class Group(TyperGroup):
    """Commands are stubs for the help page; the one that is named (or completed) becomes the real one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, stub, rest = super().resolve_command(ctx, args)
        if stub is None:  # completing an unknown command
            return name, stub, rest
        planned = name == PLAN.name
        if planned:
            if not rest or rest[0] not in PLANNED:
                return name, stub, rest
            name, *rest = rest
        console.quiet_libraries(offline="--offline" in rest)
        command = next(c for c in COMMANDS if c.name == name)
        with console.stdout_guard(), console.collecting_warnings():
            description = command.describe()
        essentials = ("--help" in rest or "-h" in rest) and HELP_ALL not in rest
        page = bool(rest) and {*rest} <= {"--help", "-h", HELP_ALL}  # nothing is parsed: a switch needs no second flag
        rest = ["--help" if word == HELP_ALL else word for word in rest]
        built = build_command(command, description, planned=planned, essentials=essentials, page=page)
        return f"{PLAN.name} {name}" if planned else name, built, rest


def version(value: bool) -> None:
    if value:
        typer.echo(f"fastdiff {__version__}")
        raise typer.Exit


def build_group() -> Any:
    """The top level: --help, --version, shell completion and a stub for each command."""
    app = typer.Typer(cls=Group, rich_markup_mode="rich", context_settings={"help_option_names": ["--help", "-h"]})

    @app.callback(help=START, epilog=SOURCES)
    def top(
        version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")] = False,
    ) -> None: ...

    for command in COMMANDS:
        app.command(command.name, help=command.help, rich_help_panel=command.panel)(lambda: None)

    @app.command(PLAN.name, help=PLAN.help, rich_help_panel=PLAN.panel, epilog="fastdiff plan train-lcm-lora --base sdxl")
    def plan(
        command: Annotated[str, typer.Argument(help=f"{', '.join(PLANNED)}; its options follow", metavar="COMMAND ...")],
        json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
    ) -> None:
        raise UsageError(f"plan {command}: not a training command", suggestion(command, PLANNED) or ", ".join(PLANNED))

    return typer.main.get_command(app)


def build_command(
    command: Command, description: Description, *, planned: bool = False, essentials: bool = False, page: bool = False
) -> Any:
    """The typer command of a Config; invoking it returns a Call.

    `planned`: the command only says what a run would take. `essentials`: the help page lists the most used options alone.
    `page`: only a help page is wanted, which shows `--flag` and leaves out `--no-flag`.
    """

    def call(**values: Any) -> Call:
        own = {k.removeprefix("cli_"): values.pop(k) for k in list(values) if k.startswith("cli_")}
        own.pop("help_all")
        return Call(command, description, values, plan=planned, **own)

    listed, first = options(description.Config), essential_names(description.Config)
    # The essential options come first on the help page, then the command's own, then the inherited ones.
    own_panel = vars(description.Config).get("PANEL") or "Options"
    place = lambda o: (first.index(o.name) if o.name in first else len(first), o.panel != own_panel)
    rows = family_rows(description, listed)
    parameters = [
        parameter(
            o,
            {family: row[o.name] for family, row in rows.items() if o.name in row},
            panel="Essentials" if o.name in first else o.panel,
            hidden=essentials and o.name not in first,
            page=page,
        )
        for o in sorted(listed, key=place)
    ]
    # typer reads a command's options from the signature
    vars(call)["__signature__"] = inspect.Signature([*parameters, *general(planned, hidden=essentials)])
    app = typer.Typer(rich_markup_mode="rich", add_completion=False)
    more = f"{HELP_ALL} lists all {len(listed)} options." if essentials and len(listed) > len(first) else ""
    if any(o.kind is bool for o in listed if not essentials or o.name in first):
        more += " --no-FLAG turns a switch off."
    summary, examples = command.help, description.examples
    if planned:
        summary = f"Say how much memory, disk and time a run of {command.name} takes on this machine"
        examples = examples.replace(f"fastdiff {command.name}", f"fastdiff {PLAN.name} {command.name}")
    text = "\n\n".join([summary, *example_paragraphs(examples)])
    app.command(command.name, help=text, epilog=more.strip() or None, context_settings={"help_option_names": ["--help", "-h"]})(
        call
    )
    return typer.main.get_command(app)


def example_paragraphs(examples: str) -> list[str]:
    """The examples of a help page as one paragraph, whose lines typer leaves as they are after a backspace."""
    lines = [f"[cyan]{escape(line)}[/cyan]" for line in examples.strip().splitlines()]
    return ["\b\n" + "\n".join(["[bold]Examples[/bold]", *lines])] if lines else []


def essential_names(config: type) -> tuple[str, ...]:
    """The options that a short help page lists: at most ten, named by the class attribute ESSENTIALS, else the first ten."""
    named = [name for cls in config.__mro__ for name in vars(cls).get("ESSENTIALS", "").split()]  # a class's own come first
    known = [o.name for o in options(config)]
    return tuple(dict.fromkeys(name for name in named or known if name in known))[:10]


def family_rows(description: Description, listed: list[Option]) -> dict[str, dict[str, Any]]:
    table = description.presets if any(o.name == "base" for o in listed) else {}
    return {family: preset(listed, table, family) for family in table}


def escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def parameter(option: Option, presets: dict[str, Any], *, panel: str, hidden: bool, page: bool) -> inspect.Parameter:
    """A field as a typer option. Its default is None (= not given), so the help text names the real one.

    Values arrive as text and are read by `config.coerce`, as those of variables are: one wording of errors for all.
    """
    values = {"default": option.default, **presets}
    values = {k: v for k, v in values.items() if v is not MISSING and v is not None and v != [] and v != ""}
    families: dict[str, list[str]] = {}  # those with the same value are listed together
    for name, value in values.items():
        if name == "default" or value != option.default:
            families.setdefault(format_value(value), []).append(name)
    words = [f"{', '.join(names)}: {value}" for value, names in families.items()]
    if option.default is MISSING:
        words.insert(0, "required")
    note = f" [dim]{escape('[' + '; '.join(words) + ']')}[/dim]" if words else ""
    kind: Any = bool if option.kind is bool else list[str] if option.repeated else str
    name = option.flag.removeprefix("--")
    flags = [f"--{name}/--no-{name}" if kind is bool and not page else f"--{name}", *option.flags]
    extra: dict[str, Any] = {}
    if kind is not bool:
        extra["metavar"] = "|".join(map(str, option.choices)) or f"<{option.kind.__name__}>"
    if option.choices:
        extra["autocompletion"] = lambda incomplete: [str(c) for c in option.choices if str(c).startswith(incomplete)]
    if option.argument:
        extra["metavar"] = option.name.upper()
    extra |= dict(help=escape(option.help) + note, show_default=False, hidden=hidden)
    heading = "Other options" if panel == "Options" else panel  # typer puts its own panel first
    info: Any = typer.Argument(**extra) if option.argument else typer.Option(*flags, rich_help_panel=heading, **extra)
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def format_value(value: Any) -> str:
    """A default as a help page writes it."""
    return ("on" if value else "off") if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


PLAN_OPTIONS = ("probe", "memory")  # what `plan` takes besides the options of the command that it plans


def general(planned: bool = False, *, hidden: bool = False) -> list[inspect.Parameter]:
    """What every command takes besides its config; `hidden`: the help page leaves these options out."""
    rows = [
        ("json", bool, ["--json"], "one JSON object on stdout, also on failure"),
        ("config", Path, ["--config"], "read options from a TOML file; a run's own config.toml repeats it"),
        ("dry_run", bool, ["--dry-run", "-n"], "print the resolved options as TOML and stop"),
        ("offline", bool, ["--offline"], "never use the network"),
        ("quiet", bool, ["--quiet", "-q"], "only results, warnings and errors"),
        ("debug", bool, ["--debug"], "show the traceback of an error"),
        ("help_all", bool, [HELP_ALL], "show all options and exit"),
    ]
    if planned:
        rows += [
            ("probe", bool, ["--probe/--no-probe"], "take some steps and measure; else rehearse without weights or card"),
            ("memory", str, ["--memory"], "plan for a CUDA card of this size, such as 16G, without a probe"),
        ]
    made = []
    for name, kind, flags, text in rows:
        extra: dict[str, Any] = {} if kind is bool else {"metavar": "FILE.toml" if kind is Path else "SIZE"}
        extra |= dict(help=text, show_default=False, rich_help_panel="General", hidden=hidden and name not in PLAN_OPTIONS)
        info = typer.Option(*flags, **extra)
        default, hint = (name == "probe", bool) if kind is bool else (None, kind | None)
        made.append(
            inspect.Parameter(f"cli_{name}", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info])
        )
    return made


def configure(call: Call) -> Any:
    """The resolved config of a call."""
    table, config = call.description.presets, call.description.Config
    has_base = any(f.name == "base" for f in fields(config))
    return resolve(config, call.flags, file=call.config, presets=table, family_of=family_name if table and has_base else None)


def family_name(values: Mapping[str, Any]) -> str:
    """The family of the base that the options name; a file is opened only where the name is no alias."""
    from fastdiff.checkpoints import family

    if known := family.named(values["base"]):
        return known.name
    from fastdiff.checkpoints import locate

    pickle = values.get("allow_pickle", False)
    return locate.family_of(values["base"], config=values.get("base_config"), allow_pickle=pickle).name


@dataclass
class Failure:
    """An error as a user sees it."""

    exit_code: int
    kind: str
    message: str
    hint: str = ""
    result: Result | None = None


def explain(error: BaseException) -> Failure:
    """One line and an exit code for any error; what a user can put right never looks like a crash."""
    if isinstance(error, UsageError):
        hint = error.hint if isinstance(error, Stopped) else with_flags(error.hint)  # that of a stop is a command to type
        return Failure(error.exit_code, error.kind, with_flags(str(error)), hint, error.result)
    if isinstance(error, PARSER_ERROR):
        parsing = cast(Any, error)  # of typer's own copy of click
        near = list(vars(error).get("possibilities") or [])
        message = parsing.format_message().split(" (Possible options")[0]
        return Failure(2, "usage", message, suggestion(parsing.option_name, near) if near else "")
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Failure(130, "stopped", "interrupted")
    if isinstance(error, typer.Exit | SystemExit):
        code = error.code if isinstance(error, SystemExit) else error.exit_code
        return Failure(code if isinstance(code, int) else 1, "failure", f"the command ended early ({code})")
    if clear := device_error(error):
        return explain(clear)
    name = type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {(error.strerror or name).lower()}"
        missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        return Failure(3, "input", message) if missing else Failure(1, "failure", message)
    if type(error) is ValueError and raised_here(error):
        return Failure(2, "usage", with_flags(str(error)))
    return Failure(1, "unexpected", f"unexpected error: {name}: {error}", "--debug shows the traceback")


def raised_here(error: BaseException) -> bool:
    """Whether our own code raised it, not a library that we called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def stoppable(call: Call) -> AbstractContextManager[None]:
    """A command that trains ends between two units of work, and tells how it goes on."""
    from fastdiff.runtime import stop

    return stop.watching(call.line)


def typed(call: Call) -> str:
    """The command line of a call, without the general flags."""
    words = ["fastdiff", call.command.name, *(["--config", str(call.config)] if call.config else [])]
    for o in options(call.description.Config):
        value = call.flags.get(o.name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                words.append(o.flag if item else f"--no-{o.flag.removeprefix('--')}")
            elif item is not None:
                words += [str(item)] if o.argument else [o.flag, str(item)]
    return shlex.join(words)


def perform(call: Call) -> tuple[Result, str]:
    """Run a call, nothing of it on stdout; returns its result and the text of that for people."""
    with console.stdout_guard(), console.collecting_warnings():
        config = configure(call)
        if call.dry_run:
            values = {o.name: vars(config)[o.name] for o in options(type(config))}
            return Result(metrics={"config": values}), to_toml(config).rstrip("\n")
        if call.plan:
            from fastdiff.commands import plan

            result = plan.run(call.work.method, config, probe=call.probe, typed=typed(call), memory=call.memory)
        else:
            with stoppable(call) if call.work.resumes else nullcontext():
                result = call.work.run(config)
        for path in result.outputs:
            if not Path(path).exists():
                raise RuntimeError(f"{path} was not written")
    lines = [str(path) for path in result.outputs]
    if result.next_command and not call.quiet:
        lines.append(f"next: {result.next_command}")
    return result, "\n".join(lines)


def emit(text: str) -> None:
    """Write the result; a reader that has gone away (`| head`) is no error."""
    if not text or not console.speaks():
        return
    try:
        print(hidden(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code. Messages name flags in here, and fields again afterwards."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if args in ([HELP_ALL], ["help"]):  # the top page has no more to show
        args = ["--help"]
    console.reset(quiet="--quiet" in args or "-q" in args, flags=True)
    try:
        return answer(args)
    finally:
        console.state.flags = False


def answer(args: list[str]) -> int:
    as_json, debug = "--json" in args, "--debug" in args  # until the parser has been asked
    name = next((a for a in args if not a.startswith("-")), None)
    call = failure = None
    text = ""
    try:
        call = build_group().main(args, prog_name="fastdiff", standalone_mode=False)
        if call == 130:  # how typer reports Ctrl-C
            raise KeyboardInterrupt
        if not isinstance(call, Call):  # --help, --version
            return call or 0
        as_json, debug, console.state.quiet = call.json, call.debug, call.quiet
        call.line = shlex.join(["fastdiff", *(a for a in args if a != "--json")])
        result, text = perform(call)
        if as_json:
            text = console.json_object(name, result)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and call is None:  # shell completion has answered
            raise
        failure = explain(error)
        if debug:
            console.trace(error)
        console.error(failure.message, failure.hint)
        if as_json:
            details = {"kind": failure.kind, "message": console.one_line(failure.message), "hint": failure.hint or None}
            text = console.json_object(name, failure.result, details)
    emit(text)
    if (failure is None or failure.kind == "stopped") and (loaded := sys.modules.get("fastdiff.runtime.processes")):
        loaded.leave()
    return failure.exit_code if failure else 0
