"""The test class: transformers' mixins on a tiny model. CONFORMANCE_VARIANT names the model, `control` is Qwen3-MoE."""

import os
import unittest

import torch
import transformers
from transformers.models.auto import modeling_auto

import modeling_moe

from . import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from .standins import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin


FIELDS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 37,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}
VARIANTS = {
    "control": {},
    "plain": {"qk_norm": "head"},
    "parallel": {"qk_norm": "head", "qk_norm_after_rope": True, "attn_output_gate": True, "lm_head_bias": True},
    "shared": {"shared_expert_intermediate_size": 36, "shared_expert_gate": True, "qkv_bias": True},
    "deepseek": {
        "num_shared_experts": 1,
        "scoring_func": "sigmoid",
        "router_selection_bias": True,
        "router_bias_update_rate": 0.001,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "olmoe": {"qk_norm": "full", "clip_qkv": 8.0, "norm_topk_prob": False},
    # Ranks that each see some rows are compared with one process that sees all, so the loss has to be a mean over
    # tokens, which the balance loss is not. The z-loss is one, and losses and gradient norms agree with it too; but
    # after 20 steps of Adam rounding shows in 2 of the 16384 weights of the embedding, by more than the tests' 1e-5.
    "fsdp": {"qk_norm": "head", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0},
}
# 2 of 4 experts per token, each with as many heads as keys have
MOA = {"routed_attention": "moa", "attention_experts": 4, "qk_norm": "head"}
VARIANTS |= {
    "moa": MOA | {"num_key_value_heads": 1},
    "moa_parallel": MOA | {"num_attention_heads": 4},  # a key head for each of two processes
}
VARIANT = os.environ["CONFORMANCE_VARIANT"]
LIBRARY, PREFIX = (transformers, "Qwen3Moe") if VARIANT == "control" else (modeling_moe, "MoE")
HEADS = {
    "MODEL": "Model",
    "MODEL_FOR_CAUSAL_LM": "ForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": "ForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION": "ForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING": "ForQuestionAnswering",
}
CLASSES = [getattr(LIBRARY, PREFIX + head) for head in HEADS.values()]

for task, head in HEADS.items():  # transformers' tests look model types up in these tables; ours is not in them
    getattr(modeling_auto, f"{task}_MAPPING_NAMES")["moe"] = f"MoE{head}"
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES.add("moe")
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES.add("moe")
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES.add("moe")
test_fsdp_mixin._get_available_fsdp_workers = lambda: 8  # also where there are fewer cores


class ModelTester:
    """What the mixins ask for: sizes, a configuration, inputs."""

    batch_size = 13
    seq_length = 7
    is_training = True
    causal_lm_class = CLASSES[1]

    def __init__(self):
        vars(self).update(FIELDS)

    def get_config(self):
        return CLASSES[0].config_class(**FIELDS | VARIANTS[VARIANT])

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


class ModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    model_tester = None
    test_all_params_have_gradient = False  # an expert without tokens has none
    all_model_classes = CLASSES

    def setUp(self):
        super().setUp()
        self.model_tester = ModelTester()

    def test_config(self):
        config_class = CLASSES[0].config_class
        renamed = {"mlp_only_layers", *config_class.attribute_map}
        fields = {name: value for name, value in FIELDS.items() if name not in renamed}
        ConfigTester(self, config_class=config_class, **fields).run_common_tests()
