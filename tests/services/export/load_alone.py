"""Loads exports as somebody does who has torch and transformers and not this project, and writes down what they compute.

    python -I load_alone.py FOLDER RESULTS

Every folder below FOLDER is an export; RESULTS becomes a torch file {name of the export: {what: tensor or value}}.
"""

import contextlib
import importlib.abc
import io
import re
import sys
from pathlib import Path

ABSENT = ("decay_core", "services")  # kernels/ is found through decay_core alone, and transformers asks for another one


class Absent(importlib.abc.MetaPathFinder):
    """Whatever else is installed here: this project is not."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

NEW = 8
TEXTS = ["My fellow citizens, the report", "Congress <|endoftext|>", "the year"]


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def said(call):
    """The one line of a refusal."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def computed(folder, scratch):
    """All that the tests look at."""
    model = loaded(folder)
    entries = model.model.config.vocab_size
    tokens = torch.randint(0, entries, (2, 9), generator=torch.Generator().manual_seed(0))
    alone = tokens[:1, 3:]
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    kept = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        result = {
            "tokens": tokens,
            "misplaced": [name for name, value in model.named_parameters() if value.nbytes % 64 == 0 and value.data_ptr() % 64],
            "config": AutoConfig.from_pretrained(folder, trust_remote_code=True).design,
            "logits": model(tokens).logits,
            "last_logits": model(tokens, logits_to_keep=2).logits,
            "loss": model(tokens, labels=tokens).loss,
            "padded_logits": model(tokens, attention_mask=mask).logits,
            "right_padded_logits": model(tokens, attention_mask=mask.flip(1)).logits,
            "greedy": model.generate(tokens, **kept),
            "greedy_alone": model.generate(alone, **kept),
            "greedy_padded": model.generate(tokens, attention_mask=mask, **kept),
            "beams": model.generate(tokens, num_beams=3, **kept),
            "beams_without_cache": model.generate(tokens, num_beams=3, use_cache=False, **kept),
            "beams_padded": model.generate(tokens, attention_mask=mask, num_beams=3, **kept),
            "beams_alone": model.generate(alone, num_beams=3, **kept),
        }
        first = model(tokens[:, :4], use_cache=True)
        second = model(tokens[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        result["cached_logits"] = torch.cat([first.logits, second.logits], dim=1)
        result["read"] = second.past_key_values.get_seq_length()
        model.save_pretrained(scratch)
        again = loaded(scratch)
        result["logits_after_saving_again"] = again(tokens).logits
        narrow = loaded(folder, dtype=torch.bfloat16)
        result["bf16_logits"] = narrow(tokens).logits.float()
        result["kept_wide"] = [name for name, value in narrow.named_parameters() if value.dtype == torch.float32]
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    result["trained"] = [name for name, value in model.named_parameters() if value.grad is not None]
    result["refusals"] = [
        said(lambda: model(tokens, attention_mask=mask.flip(1), use_cache=True)),
        said(lambda: model(tokens, labels=tokens, use_cache=True)),
        said(lambda: model(tokens, output_attentions=True)),
        said(lambda: model(tokens, past_key_values=(1,))),
        said(lambda: model(inputs_embeds=torch.zeros(1, 1, 1))),
        said(lambda: model(tokens, attention_mask=mask.roll(1, dims=1))),
        said(lambda: model.resize_token_embeddings(7)),
        said(lambda: model.generate(alone, prompt_lookup_num_tokens=2, **kept)),
    ]
    return result


def tokenized(folder):
    """What the tokenizer makes of texts, and the model of a batch of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    written = loaded(folder).generate(**batch, max_new_tokens=NEW, do_sample=False)
    return {
        "given": TEXTS,
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "texts": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS],
        "entries": len(tokenizer),
        "written": tokenizer.batch_decode(written),
        "special": (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side),
    }


def card_example(folder):
    """What the card's own example prints, run in the folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


def main():
    folder, results = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    found = {}
    for name in (*ABSENT, "kernels.select_kernel"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} can be imported, so this shows nothing")
    for export in sorted(folder.iterdir()):
        found[export.name] = computed(export, results.parent / "again" / export.name)
        if (export / "tokenizer.json").exists():
            found[export.name]["tokenizer"] = tokenized(export)
            found[export.name]["card_example"] = card_example(export)
    found["modules"] = sorted({name.split(".")[0] for name in sys.modules})
    torch.save(found, results)


main()
