"""Stand-ins for what transformers' test files import from modules that its source distribution leaves out."""

import copy

import torch
from parameterized import parameterized
from transformers import set_seed
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import get_leaf_tensors


# every field differs from its default
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


class GenerationTesterMixin:
    """Empty: our own tests cover `generate`."""


class ExportTesterMixin:
    """`torch.export`, as transformers drives it, keeps every output."""

    @parameterized.expand([("static", False), ("dynamic", True)])
    def test_torch_export(self, name, dynamic):
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                inputs |= {"use_cache": False}
                set_seed(0)
                model = model_class(config).eval()
                with torch.no_grad():
                    expected = get_leaf_tensors(model(**copy.deepcopy(inputs)))
                    exported = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic=dynamic))
                    actual = get_leaf_tensors(exported.program.module()(**copy.deepcopy(inputs)))
                torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
