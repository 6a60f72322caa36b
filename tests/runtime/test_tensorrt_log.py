"""The facts in a build log: messages as TensorRT for RTX 1.7.1 writes them."""

from __future__ import annotations

from runtime.engines.tensorrt_log import BuildLog

LAYERS = """Layers:
Name: __myl_CastMul_myl0_1, LayerType: kgen, Inputs: [ { Name: inputs_embeds, Dimensions: [1,-1,192] }], Metadata: _gemm_mha_v2
Name: _gemm_mha_v2_myl0_14, LayerType: kgen, Inputs: [ { Name: __myln_k_arg__bb1_42_myl0, Dimensions: [8,-1,24] }]
Name: node_MatMul_33+node_MatMul_32+node_MatMul_31_myl1_2, LayerType: gemm, Inputs: []
Name: _gemm_mha_v2_myl1_14, LayerType: kgen, Inputs: []
Name: _gemv_mha_v1_myl1_33, LayerType: kgen, Inputs: []
Name: __myl_SiluMul_myl2_18, LayerType: kgen, Inputs: []"""


def read(*messages: tuple[int, str]) -> BuildLog:
    log = BuildLog()
    for severity, message in messages:
        log.read(severity, message)
    return log


def test_bytes_are_read_for_each_profile() -> None:
    log = read(
        (3, "Total Activation Memory: 8894976 bytes"), (3, "Max Scratch Memory: 1 bytes"), (3, "Total Activation Memory: 9969664 bytes"),
        (3, "Total Weights Memory: 5362688 bytes"),
    )  # fmt: skip
    assert (log.activation_bytes, log.weights_bytes) == ([8894976, 9969664], 5362688)


def test_attention_kernels_are_counted_for_each_subgraph_by_the_layers_own_names() -> None:
    log = read((4, LAYERS))
    assert log.attention_kernels == (1, 2, 0)
    assert log.listed_layers == 6


def test_a_log_without_facts_leaves_them_unknown() -> None:
    log = read((4, "Found node_MatMul_423 to be part of self-attention pattern."))
    assert (log.weights_bytes, log.activation_bytes, log.attention_kernels) == (None, [], ())
    assert log.failure == "its log gives no reason"


def test_failure_is_the_last_errors_in_one_line_without_source_positions() -> None:
    log = read(
        (1, "ModelImporter.cpp:142: --- Begin node ---\nNode name: find"),
        (2, "a warning"),
        (1, "IBuilder::buildSerializedNetwork: Error Code 4:\n API Usage Error"),
        (1, "ModelImporter.cpp:140: While parsing node number 0"),
        (0, "out of memory"),
    )
    assert log.failure == "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error; While parsing node number 0; out of memory"
