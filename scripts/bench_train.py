"""Training speed of this trainer beside Hugging Face transformers + PyTorch, on the same shapes and batches.

    python scripts/bench_train.py                                  three small models on the CPU, float32
    python scripts/bench_train.py --models gpt2-small llama-1b --seq-len 1024 2048 --batch-size 16 --dtype bfloat16
    python scripts/bench_train.py --models gpt2-small --contenders lm trainer        fine-tuning, as `Trainer` does it
    python scripts/bench_train.py --models gpt2-small --contenders lm torch trainer --lora 8    with peft there
    python scripts/bench_train.py --set gpu     GPT-2 small, LLaMA 1B and 7B on a GPU, largest batches, profiles: writes
                                                docs/results/gpu.md (pip install -e '.[parity]' 'jax[cuda12]')

Each contender lives in a process of its own and sleeps while another is measured; they take turns, a few steps each,
so that a machine that slows down slows all of them. The table gives medians over all measured steps and their range.
A step is the whole optimizer step: forward, loss, backward, clipping, AdamW. PyTorch: sdpa attention, fused AdamW,
eager and `torch.compile` (bfloat16 by autocast over float32 parameters, as here); `trainer` is transformers' `Trainer`
with the same settings and all that it does around a step. With `--lora RANK` the model is frozen, in bfloat16 where
that is the precision, and low-rank terms of queries, keys and values (GPT-2), or queries and values (LLaMA), are
trained. With `--param-dtype bfloat16` parameters, gradients and moments are all in bfloat16, for every contender.

With `--largest N` each contender is alone on the device, with the largest batch that fits: from --batch-size up to N it
is doubled while a step succeeds, then tried half as large again; or it is halved until one does. `--profile` traces
some further steps of this trainer and ranks, below the table, what the device was busy with: a compiled operation's own
time, without that of operations within it.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from traced import device_events, ranked, sources

from lm.cli import HUGE_PAGES, with_huge_pages

SHAPES = {  # family, size or (d_model, n_layers, n_heads), vocabulary
    "gpt-6x384-256": ("gpt2", (384, 6, 6), 256),
    "gpt-6x384-8k": ("gpt2", (384, 6, 6), 8192),
    "gpt2-small": ("gpt2", "small", 50257),
    "gpt2-medium": ("gpt2", "medium", 50257),
    "llama-tiny": ("llama", "tiny", 32000),
    "llama-1b": ("llama", "1b", 32000),
    "llama-7b": ("llama", "7b", 32000),
    "gpt-2x32": ("gpt2", (32, 2, 2), 256),  # to try the script
    "llama-2x32": ("llama", (32, 2, 2), 256),
}
CPU_MODELS = ("gpt-6x384-256", "gpt-6x384-8k", "gpt2-small")
CONTENDERS = ("lm", "torch", "torch-compile", "trainer")

# What one command measures: its file, and for each model what differs from the options given.
BFLOAT16 = {"dtype": "bfloat16", "pad_vocab": True, "profile": True}
SETS = {
    "gpu": (
        "docs/results/gpu.md",
        "Training speed on a GPU",
        (
            {**BFLOAT16, "model": "gpt2-small", "seq_len": 1024, "batch_size": 32, "largest": 256, "loss_chunk": 256},
            {**BFLOAT16, "model": "llama-1b", "seq_len": 2048, "batch_size": 8, "largest": 64, "loss_chunk": 256},
            # All in bfloat16, 54 GB, and layers computed again: what fits a GPU of 80 GB or more.
            {**BFLOAT16, "model": "llama-7b", "seq_len": 2048, "batch_size": 4, "largest": 64, "loss_chunk": 256}
            | {"remat": "full", "param_dtype": "bfloat16"},
        ),
    ),
    "try": (
        "docs/results/try.md",
        "A try of the script",
        (
            {"model": "gpt-2x32", "seq_len": 16, "batch_size": 2, "largest": 4, "profile": True},
            {"model": "llama-2x32", "seq_len": 16, "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"}
            | {"batch_size": 2, "largest": 2, "profile": True},
        ),
    ),
}
# Options of a contender's process.
SHARED = ("batch_size", "dtype", "param_dtype", "remat", "loss_chunk", "warmup", "lora")
TRACED_STEPS = 3


def batch_of(model: str, batch_size: int, seq_len: int):
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, SHAPES[model][2], (batch_size, seq_len + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def model_config(args: argparse.Namespace):
    from lm.models.lora import LoraConfig
    from lm.models.presets import gpt2, llama

    family, size, vocab_size = SHAPES[args.model]
    changes = {"max_len": args.seq_len, "vocab_size": vocab_size, "compute_dtype": args.dtype, "remat": args.remat}
    changes["param_dtype"] = args.param_dtype
    if args.pad_vocab:
        changes["vocab_size"] = -(-vocab_size // 128) * 128
    if args.lora:
        targets = ".*attention/(query|key|value)" if family == "gpt2" else ".*attention/(query|value)"
        changes |= {"lora": LoraConfig(rank=args.lora, targets=targets), "param_dtype": args.dtype}
    if isinstance(size, tuple):
        changes |= dict(zip(("d_model", "n_layers", "n_heads"), size))
        changes |= {} if family == "gpt2" else {"n_kv_heads": size[2], "d_ff": 2 * size[0]}
        size = "small" if family == "gpt2" else "tiny"
    return gpt2(size, **changes) if family == "gpt2" else llama(size, **changes)


def lm_contender(args: argparse.Namespace):
    """Compiles this project's step; returns (function that runs one step and returns its loss, facts)."""
    import jax
    import numpy as np

    from lm.evaluate import to_devices
    from lm.hardware import peak_flops
    from lm.models.transformer import Transformer, flops_per_token
    from lm.optim import OptimConfig, freezing, make_optimizer, make_schedule
    from lm.run.begin import tuned_rates
    from lm.sharding import MeshConfig, make_mesh
    from lm.tasks.causal_lm import CausalLM
    from lm.train import TrainConfig, abstract_params, make_program

    config = model_config(args)
    mesh = make_mesh(MeshConfig(data=1, devices=1))
    optim = OptimConfig(schedule="constant", warmup=0, rates=tuned_rates(config), moment_dtype=args.param_dtype)
    schedule = make_schedule(optim, 10**6)
    model = Transformer(config)
    params, _ = abstract_params(model, mesh)
    tx = make_optimizer(optim, schedule, params)
    train = TrainConfig(steps=10**6, batch_size=args.batch_size)
    task = CausalLM(loss_chunk=args.loss_chunk)
    program = make_program(model, task, tx, schedule, train, mesh, freezing(optim, params))
    tokens, targets = batch_of(args.model, args.batch_size, args.seq_len)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "weights": np.ones(tokens.shape, np.float32),
        "positions": np.broadcast_to(np.arange(args.seq_len, dtype=np.int32), tokens.shape),
    }
    with jax.set_mesh(mesh):
        held = {"state": program.init()}

    def step() -> float:
        with jax.set_mesh(mesh):
            held["state"], report = program.train_step(held["state"], to_devices(batch, mesh))
            report = jax.device_get(report)
        return float(report["loss"] / report["weight"])

    def profile() -> dict:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(TRACED_STEPS):
                    step()
            (traced,) = Path(folder).rglob("*.xplane.pb")
            events = device_events(jax.profiler.ProfileData.from_file(str(traced)), "step")
        with jax.set_mesh(mesh):
            text = program.train_step.lower(program.target, to_devices(batch, mesh)).compile().as_text()
        return ranked(events, sources(text), TRACED_STEPS)

    device = jax.devices()[0]
    stats = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")  # noqa: E731
    facts = {
        "device": device.device_kind,
        "flops_per_token": flops_per_token(config, args.seq_len),
        "peak": peak_flops(device),
    }
    return step, facts, stats, profile


def torch_model(args: argparse.Namespace):
    """The same model of transformers, and its device."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    c = model_config(args)
    vocab_size = c.vocab_size
    if SHAPES[args.model][0] == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab_size,
            n_positions=args.seq_len,
            n_embd=c.d_model,
            n_layer=c.n_layers,
            n_head=c.n_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocab_size,
            max_position_embeddings=args.seq_len,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.width_of_mlp,
            tie_word_embeddings=c.tie_embeddings,
            attn_implementation="sdpa",
        )
        model = transformers.LlamaForCausalLM(config)
    model.config.use_cache = False
    if args.param_dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    if args.lora:
        import peft

        names = ["c_attn"] if SHAPES[args.model][0] == "gpt2" else ["q_proj", "v_proj"]
        if args.dtype == "bfloat16":
            model = model.to(torch.bfloat16)
        lora = peft.LoraConfig(
            r=args.lora, lora_alpha=16, target_modules=names, fan_in_fan_out=names == ["c_attn"], task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
    model = model.to(device).train()
    if args.remat == "full":
        model.gradient_checkpointing_enable()
    return model, device


def torch_memory(device: str):
    import torch

    return lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None


def trainer_contender(args: argparse.Namespace):
    """The same by transformers' `Trainer`, in a thread that waits after each step until the next is asked for."""
    import tempfile
    import threading

    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, device = torch_model(args)
    tokens, _ = batch_of(args.model, args.batch_size, args.seq_len)
    go, done, held = threading.Semaphore(0), threading.Semaphore(0), {}

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**8

        def __getitem__(self, index: int):
            row = torch.tensor(tokens[index % args.batch_size], dtype=torch.long)
            return {"input_ids": row, "labels": row}

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            go.acquire()

        def on_step_end(self, *_, **__) -> None:
            done.release()
            go.acquire()

    class Told(Trainer):
        def training_step(self, *values, **named):
            loss = super().training_step(*values, **named)
            held["loss"] = loss.item()
            return loss

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)  # a permutation of 10^8 rows takes seconds

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=10**6,
        per_device_train_batch_size=args.batch_size,
        learning_rate=3e-4,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=args.dtype == "bfloat16",
        use_cpu=device == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Told(model=model, args=settings, train_dataset=Rows(), callbacks=[Turns()])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> float:
        go.release()
        done.acquire()
        return held["loss"]

    return step, {}, torch_memory(device), None


def torch_contender(args: argparse.Namespace):
    """The same with transformers and PyTorch."""
    import contextlib

    import torch

    model, device = torch_model(args)
    forward = torch.compile(model) if args.contender == "torch-compile" else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, targets = (
        torch.tensor(x, dtype=torch.long, device=device) for x in batch_of(args.model, args.batch_size, args.seq_len)
    )
    mixed = args.dtype == "bfloat16" and args.param_dtype == "float32"
    half = torch.autocast(device, torch.bfloat16) if mixed else contextlib.nullcontext()

    def step() -> float:
        with half:
            logits = forward(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, {}, torch_memory(device), None


def work(args: argparse.Namespace) -> None:
    """A contender's process: prepares, then runs as many steps as each line of its input asks for, or `profile`."""
    make = {"lm": lm_contender, "trainer": trainer_contender}.get(args.contender, torch_contender)
    started = time.perf_counter()
    step, facts, memory, profile = make(args)
    losses = [step() for _ in range(args.warmup)]
    print(json.dumps({"ready": time.perf_counter() - started, "losses": losses, **facts}), flush=True)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps(profile()), flush=True)
            continue
        times = []
        for _ in range(int(line)):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        print(json.dumps({"times": times, "memory": memory()}), flush=True)


class Worker:
    """A contender's process, ready to be measured; `answer` is None where it did not come so far."""

    def __init__(self, contender: str, args: argparse.Namespace):
        self.contender, self.batch_size = contender, args.batch_size
        self.times: list[float] = []
        self.memory: int | None = None
        self.profile: dict | None = None
        command = [sys.executable, __file__, "--contender", contender]
        command += ["--model", args.model, "--seq-len", str(args.seq_len)]
        for name in SHARED:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        command += ["--pad-vocab"] if args.pad_vocab else []
        # The allocator takes what is needed, so that contenders can share a device, and nearly all of it if need be.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        if args.huge_pages and HUGE_PAGES.exists():  # as the `lm` program does for itself
            environment = with_huge_pages(environment, HUGE_PAGES.read_text()) or environment
        errors = None if args.verbose else subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        self.answer = read_answer(self.process)
        if self.answer is None:
            self.process.wait()
        what = "failed (--verbose shows why)" if self.answer is None else f"ready in {self.answer['ready']:.0f} s"
        print(f"{args.model}, T={args.seq_len}, B={args.batch_size}: {contender} {what}", file=sys.stderr)

    def ask(self, line: str) -> dict:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = read_answer(self.process)
        if answer is None:
            sys.exit(f"{self.contender} ended while it was measured; --verbose shows why")
        return answer

    def turn(self, steps: int) -> None:
        answer = self.ask(str(steps))
        # The first step of a turn wakes threads and caches up again.
        self.times += answer["times"][1:] if steps > 1 else answer["times"]
        self.memory = answer["memory"]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def with_batch(args: argparse.Namespace, batch_size: int) -> argparse.Namespace:
    changed = copy.copy(args)
    changed.batch_size = batch_size
    return changed


def largest_batch(contender: str, args: argparse.Namespace) -> int | None:
    """Rows of the largest batch of which a step succeeds; None where not even one row fits."""

    def fits(batch_size: int) -> bool:
        worker = Worker(contender, with_batch(args, batch_size))
        if worker.answer is None:
            return False
        worker.end()
        return True

    batch_size = args.batch_size
    while not fits(batch_size):
        batch_size //= 2
        if not batch_size:
            return None
    if batch_size == args.batch_size:
        while batch_size * 2 <= args.largest and fits(batch_size * 2):
            batch_size *= 2
    half_more = batch_size * 3 // 2
    if batch_size < half_more <= args.largest and half_more != args.batch_size and fits(half_more):
        batch_size = half_more
    return batch_size


def alone(contender: str, args: argparse.Namespace) -> Worker | None:
    """A contender measured by itself, with the largest batch that fits."""
    batch_size = largest_batch(contender, args)
    if batch_size is None:
        return None
    worker = Worker(contender, with_batch(args, batch_size))
    if worker.answer is None:
        sys.exit(f"{contender} failed with {batch_size} rows, with which it had succeeded; --verbose shows why")
    for _ in range(args.rounds):
        worker.turn(args.steps)
    finish(worker, args)
    return worker


def finish(worker: Worker, args: argparse.Namespace) -> None:
    if args.profile and worker.contender == "lm":
        worker.profile = worker.ask("profile")
    worker.end()


def measure(args: argparse.Namespace) -> list[dict]:
    """Times all contenders on one shape: in turns, or one after another with their largest batches."""
    if args.largest:
        workers = [worker for contender in args.contenders if (worker := alone(contender, args)) is not None]
    else:
        started = [Worker(contender, args) for contender in args.contenders]
        workers = [worker for worker in started if worker.answer is not None]
        for _ in range(args.rounds):
            for worker in workers:
                worker.turn(args.steps)
        for worker in workers:
            finish(worker, args)
    rows = []
    facts = next((worker.answer for worker in workers if "flops_per_token" in worker.answer), {})
    for worker in workers:
        speeds = sorted(worker.batch_size * args.seq_len / t for t in worker.times)
        median = statistics.median(speeds)
        rows.append(
            {
                "model": args.model,
                "seq_len": args.seq_len,
                "batch_size": worker.batch_size,
                "contender": worker.contender,
                "median": median,
                "low": speeds[0],
                "high": speeds[-1],
                "memory": worker.memory,
                "device": facts.get("device"),
                "mfu": median * facts["flops_per_token"] / facts["peak"] if facts.get("peak") else None,
                "first_loss": worker.answer["losses"][0],
                "profile": worker.profile,
            }
        )
    best = max((row["median"] for row in rows if row["contender"] != "lm"), default=None)
    for row in rows:
        row["ratio"] = row["median"] / best if best else None
    return rows


def read_answer(worker: subprocess.Popen) -> dict | None:
    """The next line of JSON; other output, such as a library's greeting, is passed over."""
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return None


def table(rows: list[dict], args: argparse.Namespace) -> str:
    def cell(value, form: str) -> str:
        return "" if value is None else format(value, form)

    devices = ", ".join(sorted({row["device"] for row in rows if row["device"]})) or "no device known"
    lines = [
        f"`{' '.join(['python', 'scripts/bench_train.py', *sys.argv[1:]])}`",
        "",
        f"{devices}; {machine()}.",
        f"{args.rounds} turns of {args.steps} steps each; B: rows of a batch, T: tokens of a row.",
        "",
        "| model | T | B | contender | tokens/s, median | range | x best torch | MFU | peak GiB | first loss |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['seq_len']} | {row['batch_size']} | {row['contender']} | {row['median']:,.0f} |"
            f" {row['low']:,.0f} to {row['high']:,.0f} | {cell(row['ratio'], '.2f')} | {cell(row['mfu'], '.1%')} |"
            f" {cell(row['memory'] and row['memory'] / 2**30, '.1f')} | {row['first_loss']:.3f} |"
        )
    for row in rows:
        if row["profile"]:
            lines += profile_lines(row)
    return "\n".join(lines)


def profile_lines(row: dict) -> list[str]:
    found = row["profile"]
    second = row["batch_size"] * row["seq_len"] / row["median"]
    lines = ["", f"## Where the time of {row['model']} goes", ""]
    lines += [f"Operations take {found['busy']:.4f} s of a step's {second:.4f} s; shares of the former.", ""]
    lines += ["| part | share |", "|---|---:|"]
    lines += [f"| {part} | {share:.1%} |" for part, share in found["parts"]]
    lines += ["", "| operation | of | share |", "|---|---|---:|"]
    lines += [f"| {name} | {source and f'`{source}`'} | {share:.1%} |" for name, source, share in found["operations"]]
    return lines


def machine() -> str:
    versions = []
    for package in ("jax", "flax", "torch", "transformers", "peft", "accelerate"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"Python {platform.python_version()}, {', '.join(versions)}; {cpu}, {cores} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=CPU_MODELS)
    parser.add_argument("--seq-len", nargs="+", type=int, default=[256])
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="of all that is kept")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--loss-chunk", type=int, default=0, help="this trainer's task.loss_chunk")
    parser.add_argument("--pad-vocab", action="store_true", help="round vocabularies up to 128, for all contenders")
    parser.add_argument(
        "--huge-pages",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start every contender, torch too, as the `lm` program starts itself",
    )
    parser.add_argument("--lora", type=int, default=0, help="train low-rank terms of this rank and nothing else")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:3])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn, the first of which is not counted")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn")
    parser.add_argument("--largest", type=int, default=0, help="search for the largest batch, of at most so many rows")
    parser.add_argument("--profile", action="store_true", help="rank what a step of this trainer is busy with")
    parser.add_argument("--set", choices=SETS, help="a set of models with their settings, in place of --models")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--verbose", action="store_true", help="show what contenders print on standard error")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        args.seq_len = args.seq_len[0]
        work(args)
        return
    cases = [{"model": model, "seq_len": seq_len} for model in args.models for seq_len in args.seq_len]
    title = None
    if args.set:
        output, title, cases = SETS[args.set]
        args.output = args.output or Path(output)
    rows = []
    for case in cases:
        rows += measure(argparse.Namespace(**(vars(args) | case)))
    text = (f"# {title}\n\n" if title else "") + table(rows, args)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
