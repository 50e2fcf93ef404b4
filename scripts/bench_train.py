"""Training speed of this trainer beside Hugging Face transformers + PyTorch, on the same shapes and batches.

    python scripts/bench_train.py                                  three small models on the CPU, float32
    python scripts/bench_train.py --models gpt2-small llama-1b --seq-len 1024 2048 --batch-size 16 --dtype bfloat16
    python scripts/bench_train.py --models gpt2-small --contenders lm trainer        fine-tuning, as `Trainer` does it
    python scripts/bench_train.py --models gpt2-small --contenders lm torch trainer --lora 8    with peft there

Each contender lives in a process of its own and sleeps while another is measured; they take turns, a few steps each,
so that a machine that slows down slows all of them. The table gives medians over all measured steps and their range.
A step is the whole optimizer step: forward, loss, backward, clipping, AdamW. PyTorch: sdpa attention, fused AdamW,
eager and `torch.compile` (bfloat16 by autocast over float32 parameters, as here); `trainer` is transformers' `Trainer`
with the same settings and all that it does around a step. With `--lora RANK` the model is frozen, in bfloat16 where
that is the precision, and low-rank terms of queries, keys and values (GPT-2), or queries and values (LLaMA), are
trained.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from lm.cli import HUGE_PAGES, with_huge_pages

SHAPES = {  # family, size or (d_model, n_layers, n_heads), vocabulary
    "gpt-6x384-256": ("gpt2", (384, 6, 6), 256),
    "gpt-6x384-8k": ("gpt2", (384, 6, 6), 8192),
    "gpt2-small": ("gpt2", "small", 50257),
    "gpt2-medium": ("gpt2", "medium", 50257),
    "llama-tiny": ("llama", "tiny", 32000),
    "llama-1b": ("llama", "1b", 32000),
}
CPU_MODELS = ("gpt-6x384-256", "gpt-6x384-8k", "gpt2-small")
CONTENDERS = ("lm", "torch", "torch-compile", "trainer")


def batch_of(model: str, batch_size: int, seq_len: int):
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, SHAPES[model][2], (batch_size, seq_len + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def model_config(args: argparse.Namespace):
    from lm.models.lora import LoraConfig
    from lm.models.presets import gpt2, llama

    family, size, vocab_size = SHAPES[args.model]
    changes = {"max_len": args.seq_len, "vocab_size": vocab_size, "compute_dtype": args.dtype, "remat": args.remat}
    if args.pad_vocab:
        changes["vocab_size"] = -(-vocab_size // 128) * 128
    if args.lora:
        targets = ".*attention/(query|key|value)" if family == "gpt2" else ".*attention/(query|value)"
        changes |= {"lora": LoraConfig(rank=args.lora, targets=targets), "param_dtype": args.dtype}
    if isinstance(size, tuple):
        changes |= dict(zip(("d_model", "n_layers", "n_heads"), size))
        size = "small"
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
    optim = OptimConfig(schedule="constant", warmup=0, rates=tuned_rates(config))
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

    device = jax.devices()[0]
    stats = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")  # noqa: E731
    facts = {
        "device": device.device_kind,
        "flops_per_token": flops_per_token(config, args.seq_len),
        "peak": peak_flops(device),
    }
    return step, facts, stats


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

    return step, {}, torch_memory(device)


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
    half = torch.autocast(device, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()

    def step() -> float:
        with half:
            logits = forward(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, {}, torch_memory(device)


def work(args: argparse.Namespace) -> None:
    """A contender's process: prepares, then runs as many steps as each line of its input asks for."""
    make = {"lm": lm_contender, "trainer": trainer_contender}.get(args.contender, torch_contender)
    started = time.perf_counter()
    step, facts, memory = make(args)
    losses = [step() for _ in range(args.warmup)]
    print(json.dumps({"ready": time.perf_counter() - started, "losses": losses, **facts}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        print(json.dumps({"times": times, "memory": memory()}), flush=True)


def measure(model: str, seq_len: int, args: argparse.Namespace) -> list[dict]:
    """Times all contenders on one shape, in turns."""
    workers = {}
    for contender in args.contenders:
        command = [sys.executable, __file__, "--contender", contender, "--model", model, "--seq-len", str(seq_len)]
        for name in ("batch_size", "dtype", "remat", "loss_chunk", "warmup", "lora"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        command += ["--pad-vocab"] if args.pad_vocab else []
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if args.huge_pages and HUGE_PAGES.exists():  # as the `lm` program does for itself
            environment = with_huge_pages(environment, HUGE_PAGES.read_text()) or environment
        errors = None if args.verbose else subprocess.DEVNULL
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        answer = read_answer(worker)
        if answer is None:
            print(f"{model}, T={seq_len}: {contender} failed (--verbose shows why)", file=sys.stderr)
            worker.wait()
            continue
        workers[contender] = (worker, answer)
        print(f"{model}, T={seq_len}: {contender} ready in {answer['ready']:.0f} s", file=sys.stderr)
    times: dict[str, list[float]] = {contender: [] for contender in workers}
    memory: dict[str, int | None] = {}
    for _ in range(args.rounds):
        for contender, (worker, _) in workers.items():
            worker.stdin.write(f"{args.steps}\n")
            worker.stdin.flush()
            answer = read_answer(worker)
            if answer is None:
                sys.exit(f"{contender} ended while it was measured; --verbose shows why")
            # The first step of a turn wakes threads and caches up again.
            times[contender] += answer["times"][1:] if args.steps > 1 else answer["times"]
            memory[contender] = answer["memory"]
    rows = []
    facts = next((facts for _, facts in workers.values() if "flops_per_token" in facts), {})
    for contender, (worker, own) in workers.items():
        worker.stdin.close()
        worker.wait()
        speeds = sorted(args.batch_size * seq_len / t for t in times[contender])
        rows.append(
            {
                "model": model,
                "seq_len": seq_len,
                "contender": contender,
                "median": statistics.median(speeds),
                "low": speeds[0],
                "high": speeds[-1],
                "memory": memory[contender],
                "device": facts.get("device"),
                "mfu": statistics.median(speeds) * facts["flops_per_token"] / facts["peak"]
                if facts.get("peak")
                else None,
                "first_loss": own["losses"][0],
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

    lines = [
        f"`{' '.join(['python', 'scripts/bench_train.py', *sys.argv[1:]])}`",
        "",
        f"{machine()}; batch size {args.batch_size}, {args.dtype}; {args.rounds} turns of {args.steps} steps each.",
        "",
        "| model | T | contender | tokens/s, median | range | x best torch | MFU | peak GiB | first loss |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['seq_len']} | {row['contender']} | {row['median']:,.0f} |"
            f" {row['low']:,.0f} to {row['high']:,.0f} | {cell(row['ratio'], '.2f')} | {cell(row['mfu'], '.1%')} |"
            f" {cell(row['memory'] and row['memory'] / 2**30, '.1f')} | {row['first_loss']:.3f} |"
        )
    return "\n".join(lines)


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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
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
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--verbose", action="store_true", help="show what contenders print on standard error")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        args.seq_len = args.seq_len[0]
        work(args)
        return
    rows = [row for model in args.models for seq_len in args.seq_len for row in measure(model, seq_len, args)]
    text = table(rows, args)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
