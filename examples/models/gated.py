"""A Llama with a learned gate behind each attention: `model: {path: DIRECTORY, spec: "gated:Spec"}`, started in this directory."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from verst.protocols import ModelSpec


class GatedConfig(LlamaConfig):
    model_type = "gated_llama"


class GatedLlama(LlamaForCausalLM):
    config_class = GatedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        for layer in layers:
            layer.self_attn.gate = torch.nn.Parameter(torch.ones(config.hidden_size))
            layer.self_attn.register_forward_hook(lambda module, _, output: (output[0] * module.gate, *output[1:]))


class Spec(ModelSpec):
    model_type, config_class, model_class = "gated_llama", GatedConfig, GatedLlama

    def checkpoint_name(self, parameter: str) -> str:
        return parameter.replace("self_attn.gate", "self_attn.output_gate.weight")
