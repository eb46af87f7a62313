"""QLoRA: PEFT's adapters over our layers train as over ordinary ones with the restored weight, and as over bitsandbytes'."""

import copy

import pytest
import torch

from optinfer.quantization import QuantizedLinear, quantize
from optinfer.quantization.layers import replace_module
from tests.quantization.test_layers import IDS, build

peft = pytest.importorskip("peft")

OPTIONS = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.0}


def adapted(model, config):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def losses(model, batches, steps):
    """What a few steps of Adam on the adapters do; everything else stands still."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-3)
    found = []
    for i in range(steps):
        ids = batches[i % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("scheme", ["nf4", "int8", "int4", "llm_int8", "mxfp4"])
def test_the_same_steps_as_over_the_restored_weights(scheme):
    from optinfer.quantization.lora import lora_config

    model = quantize(build("LlamaConfig"), scheme, progress=False)
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(module, QuantizedLinear):
            replace_module(plain, module, module.dequantize())
    codes = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    ours = adapted(model, lora_config(**OPTIONS))
    assert all(p.requires_grad == ("lora_" in n) for n, p in ours.named_parameters())
    batches = [IDS, IDS.flip(1)]
    found = losses(ours, batches, 12)
    expected = losses(adapted(plain, peft.LoraConfig(**OPTIONS)), batches, 12)
    assert found[-1] < 0.9 * found[0]
    rounding = 0.05 if scheme == "llm_int8" else 1e-3  # its activations are rounded, too
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
    after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in ours.named_parameters()}
    assert all(torch.equal(after[n], p) for n, p in codes.items())


def test_saved_and_loaded_and_not_merged(tmp_path):
    from optinfer.quantization.lora import lora_config

    model = quantize(build("LlamaConfig"), "nf4", progress=False)
    ours = adapted(copy.deepcopy(model), lora_config(**OPTIONS))
    losses(ours, [IDS], 3)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model, tmp_path, config=lora_config(**OPTIONS))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, ours(IDS).logits)
    with pytest.raises(ValueError, match="cannot be merged into a quantized layer"):
        ours.merge_and_unload()
    with pytest.raises(ValueError, match="use_dora"):
        lora_config(use_dora=True, **OPTIONS)
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        lora_config(init_lora_weights="pissa", **OPTIONS)


@pytest.mark.slow
def test_the_default_model_trains_as_over_bitsandbytes(tmp_path):
    """The same NF4 bits in both; their products round in bfloat16, so the curves lie close and are not one."""
    pytest.importorskip("bitsandbytes")
    import transformers

    import optinfer
    from optinfer import data
    from optinfer.quantization.lora import lora_config

    model, tokenizer = optinfer.load_model(dtype=torch.float32)
    ids = torch.tensor(tokenizer(data.text("calibration"))["input_ids"][: 4 * 64]).view(4, 1, 64)
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        optinfer.models.default_model_path(), quantization_config=options, dtype=torch.float32
    )
    found = losses(adapted(quantize(model, "nf4", progress=False), lora_config(**OPTIONS)), list(ids), 16)
    expected = losses(adapted(theirs, peft.LoraConfig(**OPTIONS)), list(ids), 16)
    assert found[-4:].mean() < found[:4].mean() - 0.1
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
