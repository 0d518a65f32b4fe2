"""What the command line says of itself: help, completion, messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
from gin_macros import macro

from jaxalign import cli, configs
from jaxalign.cli import flags, signatures

VERBS = cli.known_verbs()


def own(verb):
    return {n: p for g in cli.parameters(VERBS[verb]).values() for n, p in g.items()}


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_has_a_text(verb):
    assert [name for name, p in own(verb).items() if not p.text] == []
    assert signatures.read(VERBS[verb].function).summary


@pytest.mark.parametrize(
    ("verb", "shown"),
    [
        ("train", ["the start, and for a step (default: 1800)", "--learning_rate"]),
        ("generate", ["0 takes the most probable tokens (default: 1.0)"]),
        ("eval", ["takes the most probable tokens (default: 0.0)", "--metrics"]),
        ("steer", ["(default: fearnhead_clifford)", "(default: 16)"]),
        ("serve", ["to listen on (default: 8000)", "(default: 1048576)"]),
        ("iterate", ["how many (default: 3)", "(default: fixed)", "Gin: --gin_file"]),
        ("compare", ["(default: runs/compare)", "(test, validation) (default: test)"]),
        ("report", ["RUN_DIR... [flags]", "folder that holds them all"]),
        ("plan", ["v5e:4x4:2 (two slices)", "(default: train,score,decode)"]),
    ],
)
def test_help_shows_defaults(verb, shown, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [part for part in shown if part not in text] == []
    assert "default: None" not in text and " object at " not in text


MACROS = {
    "generate": "NUM_SAMPLES TEMPERATURE TOP_K TOP_P MIN_P TYPICAL_P REPETITION_PENALTY"
    " BAD_WORDS STOP NUM_BEAMS LENGTH_PENALTY CONTRASTIVE_ALPHA MBR REGEX INCLUDE"
    " MIN_NEW_TOKENS MAX_NEW_TOKENS BATCH_SIZE SLOTS RANDOM_SEED MESH FIELD_MAP"
    " ON_BAD_ROW",
    "score": "BATCH_SIZE MESH FIELD_MAP ON_BAD_ROW",
    "eval": "JUDGE METRICS NUM_SAMPLES TEMPERATURE MAX_NEW_TOKENS BATCH_SIZE"
    " RANDOM_SEED MESH FIELD_MAP ON_BAD_ROW",
    "steer": "NUM_PARTICLES EXPANSION RESAMPLING ESS_THRESHOLD BETA TEMPERATURE"
    " MAX_NEW_TOKENS BATCH_SIZE RANDOM_SEED FIELD_MAP ON_BAD_ROW",
    "serve": "HOST PORT BATCH_SIZE MAX_WAITING MAX_PROMPT_TOKENS MAX_NEW_TOKENS"
    " MAX_SAMPLES MAX_BODY_BYTES MAX_CONNECTIONS HEADER_SECONDS MAX_ENGINES"
    " MAX_ENGINE_BYTES",
}


@pytest.mark.parametrize("verb", MACROS)
def test_every_default_is_a_macro_and_every_macro_of_before_is_there(verb):
    named = {flags.macro(p) for p in own(verb).values()}
    assert set(MACROS[verb].split()) <= named


def call(monkeypatch, verb, *argv):
    """What a verb's function is called with, gin's part included."""
    import gin

    from jaxalign.inference import generation

    seen = {}
    monkeypatch.setattr(cli, "_load", lambda _: generation.generate)

    def configured(function):
        names = own(verb)

        def record(**given):
            for name in names:
                key = f"jaxalign.inference.generation.generate.{name}"
                try:
                    seen[name] = gin.query_parameter(key)
                except ValueError:
                    continue
            seen.update(given)

        return record

    monkeypatch.setattr(configs, "configured", configured)
    needed = ("--checkpoint=c", "--prompts=p", "--output=o", "--distributed=off")
    assert cli.main([verb, *needed, *argv]) == 0
    return seen


def test_flags_override_macros_override_files_override_the_signature(
    monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.gin").write_text("include 'runs/generate.gin'\nTOP_K = 3\n")
    seen = call(
        monkeypatch,
        "generate",
        *("--gin_file=own.gin", "--gin.TEMPERATURE=0.7", "--gin.MBR=chrf"),
        *("--stop=a,b", "--stop", "c", "--seed", "-1", "--mesh={'data': 2}"),
    )
    assert seen["stop"] == ("a,b", "c") and seen["seed"] == -1
    assert seen["mesh"] == {"data": 2} and seen["prompts"] == "p"
    assert macro("TEMPERATURE") == 0.7 and macro("TOP_K") == 3
    assert macro("MBR") == "chrf" and macro("TOP_P") == 1.0


NEEDED = "--checkpoint=c --prompts=p --output=o"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"generate {NEEDED} --temprature=1", "--temprature. Nearest: --temperature"),
        (f"generate {NEEDED} --gin_fil=1", "Unknown flag --gin_fil; known: --gin_file"),
        (f"generate {NEEDED} --gin.TEMPRATURE=1", "Nearest: TEMPERATURE"),
        (f"generate {NEEDED} --top_k=1.5", "--top_k=1.5: expected a whole number."),
        (f"generate {NEEDED} --top_p=x", "--top_p=x: expected a number."),
        (f"generate {NEEDED} --mesh={{", "expected a Python literal"),
        (f"generate {NEEDED} --top_k", "--top_k needs a value: --top_k=VALUE."),
        (f"generate {NEEDED} more", "'more' has no flag before it."),
        (f"generate {NEEDED} --seed=1 --gin.RANDOM_SEED=2", "--seed and --gin.RANDOM"),
        ("generate --prompts=p", "Missing --checkpoint=..., --output=..."),
        ("iterate --reference=fix", "expected fixed or refreshed. Did you mean fixed?"),
        ("report", "Missing RUN_DIR."),
        ("tasks --gin.X=1", "jaxalign tasks takes no --gin flags."),
        ("train --gin_file=runs/dpo.gin --gin.BETTA=1", "Nearest: BETA"),
        ("train --gin_file=runs/dpo.gin --bath_size=1", "Nearest: --batch_size"),
        ("train --gin_file=runs/dpq.gin --data=x", "Nearest: runs/dpo.gin"),
        ("train --gin_file=runs/dpo.gin --profile_steps=a", "FIRST,LAST"),
        (
            "train --gin_file=runs/dpo.gin --data=a --gin.DATA=b",
            "--data and --gin.DATA both set DATA",
        ),
        (
            "train --gin_file=runs/dpo.gin --run_dir=a --gin.MODEL_DIR=b",
            "--run_dir and --gin.MODEL_DIR both set MODEL_DIR",
        ),
        ("train --gin_file=runs/dpo.gin --gin.TRAIN_STEPS=1o", "default is 1000"),
        ("train --gin_file=runs/dpo.gin --gin.GRAD_CLIP=1.O", "cannot parse"),
        ("train --gin_file=runs/dpo.gin --data=ultrafeedbak", "mean 'ultrafeedback'?"),
        ("data --gin_file=runs/dpo.gin --gin.DATA='gsmk'", "did you mean 'gsm8k'?"),
        ("train --data=x", "train needs a run: --gin_file=runs/sft.gin"),
    ],
)
def test_mistakes_are_told_before_jax_is_imported(line, told):
    code = (
        "import sys; from jaxalign import cli; status = cli.main(sys.argv[1:]); "
        "assert status == 2 and not {'jax', 'orbax', 'grain'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split()],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["eval", "--help"], ["iterate", "--help"]]
)
def test_help_imports_no_jax(argv):
    code = (
        "import sys; from jaxalign import cli; assert cli.main(sys.argv[1:]) == 0; "
        "assert not {'jax', 'numpy', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True)


OWN = '''
from collections.abc import Sequence


def greet(name: str, *, times: int = 1, loud: bool = False, to: Sequence[str] = ()):
    """Greets.

    Args:
      name: of who greets.
      times: how often.
      loud: whether it shouts.
      to: whom, comma-separated.
    """
    return " ".join([name + "!" * loud] * times + list(to))
'''


def test_a_function_of_ones_own_is_a_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_verb.py").write_text(OWN)
    for name in ("own_verb:greet", "own_verb.py:greet"):
        assert cli.main([name, "ada", "--times=2", "--loud", "--to=a,b"]) == 0
        assert capsys.readouterr().out == "ada! ada! a b\n"
    assert cli.main(["own_verb:greet", "--help"]) == 0
    assert "whether it shouts" in capsys.readouterr().out
    for argv, told in (
        (["own_verb:gret"], "Did you mean 'greet'?"),
        (["own_verd:greet", "x"], "no module named 'own_verd'"),
        (["own_verd.py:greet"], "Did you mean 'own_verb.py'?"),
        (["own_verb:greet", "x", "--tims=2"], "Nearest: --times"),
    ):
        assert cli.main(argv) == 2
        assert told in capsys.readouterr().err


COMPLETE = """
source <(printf '%s' "$SCRIPT")
COMP_WORDS=("$@"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_jaxalign
printf '%s\\n' "${COMPREPLY[@]}"
"""


RUNS = ["runs/dro_p.gin", "runs/dro_v.gin"]


@pytest.fixture(scope="module")
def script():
    """Made by a process of its own, which must not have loaded JAX to do so."""
    code = (
        "import sys; from jaxalign import cli; cli.main(['completion', 'bash']); "
        "assert not {'jax', 'numpy', 'tensorflow'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gen"], ["generate "]),
        (["train", "--dry"], ["--dry_run"]),
        (["serve", "--po"], ["--port="]),
        (["iterate", "--reference", "=", "f"], ["fixed"]),  # as bash splits words
        (["iterate", "--reference=f"], ["--reference=fixed"]),  # as zsh does
        (["train", "--gin_file", "=", "runs/dro"], RUNS),
        (["generate", "--prompts", "=", "my pro"], ["my prompts.jsonl"]),
        (["completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes(script, words, expected, tmp_path):
    (tmp_path / "my prompts.jsonl").touch()
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", "jaxalign", *words],
        cwd=tmp_path,
        env={"SCRIPT": script},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == expected and done.stderr == ""


def test_zsh_uses_the_same_function(script, capsys):
    assert cli.main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.endswith(script) and "bashcompinit" in text


def serve(*_):
    """A function whose name appears in messages."""


MESSAGES = {
    f"Port 80.\n  In call to configurable 'serve' ({serve})\n"
    "  In call to configurable 'Run' (<class 'x.Run'>) in scope 'a'": "Port 80.",
    f"expected a number, got {serve}.": "expected a number, got serve.",
    f"got {object()}": "got object",
    f"got {serve.__get__(object())}": "got serve",
    f"got {(lambda: 0)}": "got lambda",
    "a < b and <EOS> 0x10": "a < b and <EOS> 0x10",
}


def test_no_python_object_is_shown(monkeypatch, capsys):
    for message, shown in MESSAGES.items():

        def fail(*_, message=message):
            raise ValueError(message)

        monkeypatch.setattr(cli, "_run", fail)
        assert cli.main(["tasks"]) == 2
        assert capsys.readouterr().err == f"ValueError: {shown}\n"


def test_a_good_suggestion_comes_without_the_whole_list(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "Unknown verb 'trian'. Did you mean train?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "Known: train, data" in capsys.readouterr().err
