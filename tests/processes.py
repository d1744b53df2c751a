"""Processes that tests start: forked from one that has imported torch and the trainer, which takes seconds.

They are told of one another as `torch.distributed.run` tells them, and joined by gloo. This file, run, is the
process that forks: each line that it reads is a call of `Forker`, each that it writes the answer.
"""

import atexit
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ROOT = Path(__file__).parents[1]
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
PATIENCE = 10  # seconds that processes have to follow one that failed


class Started:
    """`processes` processes that run a script, or -m and a module."""

    def __init__(self, processes, *command, **environment):
        self.command, self.folder = [*map(str, command)], tempfile.TemporaryDirectory(prefix="sddit-")
        self.pids = ask("fork", processes, self.command, os.environ | environment | CPU, self.folder.name)

    def wait(self):
        """What they printed, and the exit code of one that failed, if any did."""
        codes = ask("wait", self.pids)
        out, err = (Path(self.folder.name, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(self.command, next(filter(None, codes), 0), out, err)

    def kill_when(self, condition):
        """Kills all, whatever they are at, as a machine does that is taken away, once a condition is met."""
        deadline = time.monotonic() + 100
        while not condition():
            assert not ask("ended", self.pids), self.wait().stderr
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        assert {*ask("wait", self.pids)} == {-signal.SIGKILL}


def launch(processes, *command, **environment):
    """What `processes` processes of a script, or of -m and a module, printed, and whether they failed."""
    return Started(processes, *command, **environment).wait()


def torchrun(processes, *command):
    """The same, by torch's own launcher, which takes longer."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(command, env=os.environ | CPU, capture_output=True, text=True)


def launch_environment(config):
    """What `accelerate launch --config_file configs/...` tells its processes."""
    command = ["--config_file", str(ROOT / "configs" / f"{config}.yaml"), str(ROOT / "train_sddit.py")]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        arguments.main_process_port = 0  # any: `launch` has its own
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    # DeepSpeed compiles what its CPUs talk through; once is enough, so not into the folder of one session.
    built = Path.home() / ".cache/torch_extensions/sddit-tests"
    settings = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(built)}
    return environment | settings | {"ACCELERATE_MIXED_PRECISION": "no"}


def ask(call, *arguments):
    print(json.dumps([call, *arguments]), file=forker().stdin, flush=True)
    return json.loads(forker().stdout.readline())


@cache
def forker():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | CPU | {"PYTHONPATH": path},
    )  # fmt: skip
    atexit.register(lambda: (process.stdin.close(), process.wait()))
    return process


class Forker:
    def __init__(self):
        self.codes = {}

    def fork(self, processes, command, environment, folder):
        """The processes' ids; they print into files `out` and `err`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        pids = []
        for rank in range(processes):
            pids.append(os.fork())
            if pids[-1] == 0:
                environment |= {"RANK": rank, "LOCAL_RANK": rank}
                os.environ.clear()
                os.environ.update({name: str(value) for name, value in environment.items()})
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
                os._exit(run(command))
        return pids

    def ended(self, pids):
        """The exit codes of those that have ended."""
        for pid in pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [self.codes[pid] for pid in pids if pid in self.codes]

    def wait(self, pids):
        """The exit codes of all, which end when one has failed."""
        deadline = None
        while len(codes := self.ended(pids)) < len(pids):
            time.sleep(0.01)
            if deadline is None and any(codes):
                deadline = time.monotonic() + PATIENCE
            if deadline is not None and time.monotonic() > deadline:
                for pid in {*pids} - self.codes.keys():
                    os.kill(pid, signal.SIGKILL)
        return codes


def run(command):
    """Runs a script, or -m and a module, as the main program; its exit code."""
    code = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    import train_sddit  # noqa: F401  what the processes need not import

    calls = Forker()
    for line in sys.stdin:
        call, *arguments = json.loads(line)
        print(json.dumps(getattr(calls, call)(*arguments)), flush=True)
