"""Train `examples/tiny-mixtral`, a 3.6 M parameter Mixtral, from scratch on the Python standard library.

    OMP_WAIT_POLICY=PASSIVE python examples/train_tiny_mixtral.py --out examples/tiny-mixtral
    python examples/train_tiny_mixtral.py --evaluate examples/tiny-mixtral

The text is the standard library of the interpreter that runs this script, so nothing is downloaded. The modules in
`HELD_OUT` are never trained on, and never seen by the tokenizer; they become `heldout.txt`, the text for perplexity.
torch.compile needs a C++ compiler. OMP_WAIT_POLICY keeps waiting threads from spinning, which on a shared machine
can cost ten times the speed.

Shape letters: N windows in a batch, S tokens in a window, V vocabulary, D hidden width.
"""

import argparse
import json
import math
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

BOS, EOS = 1, 2
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2; bytes cover every text, so <unk> never appears
PERPLEXITY_WINDOW = 256

ARCHITECTURE = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 1024,
    "sliding_window": None,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.02,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

HELD_OUT = (
    "bisect.py",
    "csv.py",
    "fnmatch.py",
    "getpass.py",
    "graphlib.py",
    "heapq.py",
    "queue.py",
    "sched.py",
    "shlex.py",
    "textwrap.py",
)
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
SKIPPED_TABLES = {"html/entities.py", "stringprep.py"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # build settings of this one interpreter

# A newline and the indentation after it are tokens of their own, so a prompt that stops after either one splits
# exactly as the same text did in training. Elsewhere a word takes the space before it along.
SPLIT = r"\n|(?<=\n) +| ?[^\W\d]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast to train; one step sees `batch * window` tokens."""

    steps: int
    batch: int
    window: int
    learning_rate: float
    warmup: int
    weight_decay: float
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to zero."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def read_corpus() -> tuple[list[str], list[str]]:
    """Return the training files and the held-out files as text, each in a fixed order."""
    stdlib = Path(sysconfig.get_path("stdlib"))

    def wanted(name: Path) -> bool:
        return (
            not SKIPPED_FOLDERS.intersection(name.parts)
            and name.as_posix() not in SKIPPED_TABLES
            and not name.parts[0].startswith(SKIPPED_PREFIXES)
            and name.as_posix() not in HELD_OUT
        )

    names = sorted(path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    training = [(stdlib / name).read_text(encoding="utf-8") for name in names if wanted(name)]
    held_out = [f"# ---- {name} ----\n" + (stdlib / name).read_text(encoding="utf-8") for name in HELD_OUT]
    return [text for text in training if text.strip()], held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; encoding puts `<s>` in front of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """Each file as `<s> ... </s>` token ids; a literal "</s>" inside a file stays ordinary text."""
    tokenizer.encode_special_tokens = True
    documents = [torch.tensor([*encoding.ids, EOS]) for encoding in tokenizer.encode_batch(texts)]
    tokenizer.encode_special_tokens = False
    return documents


def batches(documents: list[torch.Tensor], recipe: Recipe, first_step: int) -> Iterator[torch.Tensor]:
    """Yield the token ids [N, S + 1] of every step: per epoch, shuffled files in one row, cut into shuffled windows."""
    step = 0
    for epoch in count():
        shuffle = random.Random(f"{recipe.seed}/{epoch}")
        row = torch.cat(shuffle.sample(documents, len(documents)))
        starts = list(range(shuffle.randrange(recipe.window), len(row) - recipe.window, recipe.window))
        shuffle.shuffle(starts)
        for first in range(0, len(starts) - recipe.batch + 1, recipe.batch):
            if step == recipe.steps:
                return
            if step >= first_step:
                yield torch.stack([row[at : at + recipe.window + 1] for at in starts[first : first + recipe.batch]])
            step += 1


def build_model() -> MixtralForCausalLM:
    config = MixtralConfig(**ARCHITECTURE, use_cache=False)
    model = MixtralForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")  # the fastest on a CPU at this size
    return model


class Optimizers:
    """Muon for the matrices inside the layers; AdamW for embeddings, output head, routers and norms.

    torch's Muon takes 2-D parameters only, so every expert's matrix goes to it as a view of its 3-D stack.
    """

    def __init__(self, model: MixtralForCausalLM, recipe: Recipe):
        inner, outer, vectors, self.stacks = [], [], [], []
        for name, weight in model.named_parameters():
            if weight.dim() == 3:
                views = [torch.nn.Parameter(matrix) for matrix in weight.data.unbind()]
                self.stacks.append((weight, views))
                inner += views
            elif weight.dim() == 1:
                vectors.append(weight)
            elif ".self_attn." in name:
                inner.append(weight)
            else:
                outer.append(weight)
        decay = recipe.weight_decay
        groups = [{"params": outer, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers = (
            torch.optim.Muon(inner, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
        )

    def step(self, learning_rate: float) -> None:
        for stack, views in self.stacks:
            for view, gradient in zip(views, stack.grad.unbind(), strict=True):
                view.grad = gradient
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def losses(model: MixtralForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (next-token loss, load-balancing loss) of token ids [N, S + 1].

    The balance is taken per layer. transformers' own sum pools the layers first, and so lets one layer's overloaded
    expert hide behind another layer's idle one. Perfect balance gives `num_experts_per_tok`.
    """
    config = model.config
    output = model(input_ids=tokens[:, :-1], output_router_logits=True)
    prediction = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())  # logits: [N, S, V]
    per_layer = [
        load_balancing_loss_func((logits,), config.num_local_experts, config.num_experts_per_tok)
        for logits in output.router_logits
    ]
    return prediction, torch.stack(per_layer).mean()


def train(model: MixtralForCausalLM, documents: list[torch.Tensor], recipe: Recipe, resume: Path) -> None:
    """Train in place. The state goes to `resume` every 250 steps, and is picked up from there after a stop."""
    optimizers, first_step, seconds_before = Optimizers(model, recipe), 0, 0.0
    if resume.exists():
        state = torch.load(resume)
        if state["recipe"] != str(recipe):
            raise SystemExit(f"{resume} belongs to {state['recipe']}, not to {recipe}: delete it or pass those options")
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        first_step, seconds_before = state["step"], state["seconds"]
        print(f"resuming at step {first_step}", flush=True)

    model.train()
    compiled_losses = torch.compile(losses, dynamic=False)
    started = time.monotonic()
    for step, tokens in enumerate(batches(documents, recipe, first_step), start=first_step):
        with torch.autocast("cpu", torch.bfloat16):  # the weights and the optimizers stay in float32
            prediction, balance = compiled_losses(model, tokens)
        (prediction + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(recipe.learning_rate_at(step))
        model.zero_grad()

        done, seconds = step + 1, seconds_before + time.monotonic() - started
        if done % 50 == 0 or done == recipe.steps:
            print(
                f"step {done}/{recipe.steps}  loss {prediction.item():.3f}  balance {balance.item():.3f}  "
                f"tokens {done * recipe.batch * recipe.window / 1e6:.2f} M  minutes {seconds / 60:.1f}",
                flush=True,
            )
        if done % 250 == 0 or done == recipe.steps:
            state = {"model": model.state_dict(), "optimizers": optimizers.state_dict()}
            state |= {"step": done, "seconds": seconds, "recipe": str(recipe)}
            torch.save(state, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").replace(resume)


def save(model: MixtralForCausalLM, tokenizer: Tokenizer, held_out: list[str], out: Path) -> None:
    """Write the checkpoint in bfloat16; every file is complete before it takes its name."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        staging = Path(folder)
        model.config.use_cache = True
        model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS)
        model.to(torch.bfloat16).save_pretrained(staging)
        tokenizer.save(str(staging / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": SPECIAL_TOKENS[0],
            "bos_token": SPECIAL_TOKENS[BOS],
            "eos_token": SPECIAL_TOKENS[EOS],
            "clean_up_tokenization_spaces": False,
            "model_max_length": ARCHITECTURE["max_position_embeddings"],
        }
        (staging / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
        (staging / "heldout.txt").write_text("".join(held_out), encoding="utf-8")
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner only
            path.replace(out / path.name)


@torch.inference_mode()
def perplexity(model: MixtralForCausalLM, tokens: torch.Tensor) -> float:
    """exp(mean negative log likelihood) of token ids [length], in float32.

    The ids are cut into consecutive windows of 256 that do not overlap; a last window of one token is dropped. Each
    window runs alone, from an empty cache, and every token but its first is scored.
    """
    model.eval()
    total, scored = 0.0, 0
    for window in tokens.split(PERPLEXITY_WINDOW):
        if len(window) < 2:
            continue
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()  # [S - 1, V]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        scored += len(window) - 1
    return math.exp(total / scored)


def evaluate(folder: Path) -> float:
    """Return the held-out perplexity of the checkpoint in `folder`, computed in float32."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8")).ids)
    return perplexity(MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-mixtral"), help="checkpoint folder to write")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="print DIR's held-out perplexity; do not train")
    parser.add_argument("--resume", type=Path, default=Path("build/tiny-mixtral-state.pt"), help="training state file")
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="for matrices; norms have none")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text")
    options = vars(parser.parse_args())
    out, folder, resume = options.pop("out"), options.pop("evaluate"), options.pop("resume")

    if folder:
        print(f"perplexity {evaluate(folder):.4f}")
        return

    recipe = Recipe(**options)
    torch.manual_seed(recipe.seed)
    training, held_out = read_corpus()
    tokenizer = train_tokenizer(training)
    documents = encode_documents(tokenizer, training)
    print(f"{len(documents)} files, {sum(map(len, documents)) / 1e6:.2f} M tokens; {recipe}", flush=True)
    resume.parent.mkdir(parents=True, exist_ok=True)
    model = build_model()
    train(model, documents, recipe, resume)
    save(model, tokenizer, held_out, out)
    print(f"saved {out}  perplexity {evaluate(out):.4f}")


if __name__ == "__main__":
    main()
