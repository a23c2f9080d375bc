"""The tables and sizes that callers add, compare and allocate: to the byte (contract, section 4)."""

from __future__ import annotations

import pickle

import pytest

torch = pytest.importorskip("torch")

import deep_ep  # noqa: E402
import deep_ep_cpp  # noqa: E402
from deep_ep import Buffer, Config  # noqa: E402

BF16_7168 = 14336
FIELDS = ("num_sms", "num_max_nvl_chunked_send_tokens", "num_max_nvl_chunked_recv_tokens",
          "num_max_rdma_chunked_send_tokens", "num_max_rdma_chunked_recv_tokens")


def values(config: Config) -> tuple:
    return tuple(getattr(config, name) for name in FIELDS)


@pytest.fixture(autouse=True)
def keep_num_sms():
    before = Buffer.num_sms
    yield
    Buffer.num_sms = before


def test_config_by_position_keyword_and_json():
    assert values(Config()) == (20, 6, 256, 6, 258)
    assert values(Config(24, 8, 128, 20, 128)) == (24, 8, 128, 20, 140)
    assert values(Config(24, 8, 128, 12, 128)) == (24, 8, 128, 12, 132)
    assert values(Config(**dict(zip(FIELDS, (7, 1, 2, 3, 6))))) == (7, 1, 2, 3, 6)
    assert repr(Config()) == "Config(" + ", ".join(f"{n}={v}" for n, v in zip(FIELDS, (20, 6, 256, 6, 258))) + ")"
    assert values(pickle.loads(pickle.dumps(Config(3)))) == values(Config(3))
    assert deep_ep_cpp.Config is Config


@pytest.mark.parametrize("arguments, name", [
    ((-1,), "num_sms"), ((20, 0), "num_max_nvl_chunked_send_tokens"), ((20, 6, 6), "num_max_nvl_chunked_recv_tokens"),
    ((20, 6, 5), "num_max_nvl_chunked_recv_tokens"), ((20, 6, 256, 0), "num_max_rdma_chunked_send_tokens"),
    ((20, 6, 256, 6, 0), "num_max_rdma_chunked_recv_tokens"), ((20, 6, 256, 6, 6), "num_max_rdma_chunked_recv_tokens")])
def test_config_refuses(arguments, name):
    with pytest.raises(deep_ep.ArgumentError, match=f"^Config: {name} = {arguments[-1]}, allowed: ") as error:
        Config(*arguments)
    assert error.value.argument == name


def test_config_allows_zero_and_odd_sms_and_the_tightest_rdma():
    assert values(Config(0))[0] == 0 and values(Config(3))[0] == 3
    assert values(Config(20, 6, 256, 6, 7))[4] == 12  # rounded up, then just twice the send


DISPATCH = {2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128), 16: (36, 288, 20, 128), 24: (32, 288, 8, 128),
            32: (32, 288, 8, 128), 48: (32, 288, 8, 128), 64: (32, 288, 8, 128), 96: (20, 480, 12, 128),
            128: (20, 560, 12, 128), 144: (32, 720, 12, 128), 160: (28, 720, 12, 128)}
COMBINE = {2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128), 16: (4, 288, 12, 128), 24: (1, 288, 8, 128),
           32: (1, 288, 8, 128), 48: (1, 288, 8, 128), 64: (1, 288, 8, 128), 96: (1, 480, 8, 128), 128: (1, 560, 8, 128),
           144: (2, 720, 8, 128), 160: (2, 720, 8, 128)}


@pytest.mark.parametrize("table, get", [(DISPATCH, Buffer.get_dispatch_config), (COMBINE, Buffer.get_combine_config)])
def test_default_tables(table, get):
    for num_ranks in range(1, 200):
        listed = max((count for count in table if count <= num_ranks), default=2)
        assert values(get(num_ranks)) == values(Config(20, *table[listed])), num_ranks
    Buffer.set_num_sms(24)
    assert values(get(4))[0] == 24
    for wrong in (0, -3):
        with pytest.raises(deep_ep.ArgumentError, match=f"num_ranks = {wrong}, allowed: >= 1"):
            get(wrong)


def test_set_num_sms():
    assert Buffer.num_sms == 20
    Buffer.set_num_sms(7)
    assert Buffer.num_sms == 7
    Buffer.set_num_sms(new_num_sms=1)
    with pytest.raises(deep_ep.ArgumentError, match=r"^Buffer.set_num_sms: new_num_sms = 0, allowed: 1 or more"):
        Buffer.set_num_sms(0)
    assert Buffer.num_sms == 1


def formula(config: Config, hidden_bytes: int, num_ranks: int) -> tuple:
    """Section 4.3, in Python's unbounded integers."""
    def up(value: int) -> int:
        return -(-value // 128) * 128

    channels, ranks, nodes = config.num_sms // 2, min(num_ranks, 8), max(-(-num_ranks // 8), 1)
    slot = hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4
    nvl = up(channels * ranks * (2 * nodes + 3) * 4 + channels * ranks * config.num_max_nvl_chunked_recv_tokens * slot)
    rdma = up(channels * nodes * 18 * 2 * 4 + 2 * channels * nodes * config.num_max_rdma_chunked_recv_tokens * (slot + 16))
    return nvl, rdma if num_ranks > 8 else 0


HINTS = {1: (41_963_776, 0, 0), 2: (83_927_552, 0, 0), 4: (167_854_976, 0, 0), 8: (335_709_824, 0, 0),
         16: (377_673_984, 91_887_744, 86_637_184), 32: (377_675_264, 168_023_680, 168_023_680),
         64: (377_677_824, 336_047_360, 336_047_360), 160: (944_193_024, 866_371_200, 840_118_400)}


@pytest.mark.parametrize("num_ranks", HINTS)
def test_high_throughput_hints_of_the_document(num_ranks):
    nvl, rdma_dispatch, rdma_combine = HINTS[num_ranks]
    for config, rdma in ((Buffer.get_dispatch_config(num_ranks), rdma_dispatch),
                         (Buffer.get_combine_config(num_ranks), rdma_combine)):
        assert config.get_nvl_buffer_size_hint(BF16_7168, num_ranks) == nvl
        assert config.get_rdma_buffer_size_hint(hidden_bytes=BF16_7168, num_ranks=num_ranks) == rdma


def test_high_throughput_hints_of_other_shapes():
    assert Config(24).get_nvl_buffer_size_hint(4096 * 2, 4) == 125_928_448
    assert Config(20).get_nvl_buffer_size_hint(2880 * 2, 4) == 80_036_736


@pytest.mark.parametrize("num_sms", [0, 1, 7, 24])
@pytest.mark.parametrize("num_ranks", [1, 3, 6, 9, 12, 72])
def test_high_throughput_hints_are_the_formula(num_sms, num_ranks):
    config = Config(num_sms, 5, 77, 9, 100)
    for hidden_bytes in (0, 16, 5760, 2**33):
        nvl, rdma = formula(config, hidden_bytes, num_ranks)
        assert config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) == nvl
        assert config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) == rdma


LOW_LATENCY = {(64, 2048, 128): 136_316_032, (96, 4096, 160): 511_182_208, (128, 7168, 288): 2_146_961_792,
               (128, 2880, 128): 383_517_824, (256, 7168, 384): 5_725_228_160, (384, 6144, 320): 6_134_172_288,
               (128, 3584, 896): 3_339_721_856, (2048, 5120, 448): 38_168_170_112, (128, 7168, 256): 1_908_410_496}


@pytest.mark.parametrize("shape", LOW_LATENCY)
def test_low_latency_hint(shape):
    max_tokens, hidden, num_experts = shape
    for num_ranks in (1, 4, 64):
        assert Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, num_ranks, num_experts) == LOW_LATENCY[shape]
    assert Buffer.get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank=max_tokens, hidden=hidden, num_ranks=8,
                                                 num_experts=num_experts) == LOW_LATENCY[shape]
    assert deep_ep_cpp.get_low_latency_rdma_size_hint(max_tokens, hidden, 8, num_experts) == LOW_LATENCY[shape]


def test_low_latency_hint_is_the_formula_and_always_adds():
    for max_tokens in (1, 3, 128):
        for hidden in (8, 128, 136, 2048):
            for num_experts in (1, 31, 32, 64):
                scales = -(-hidden // 128)
                message, answer = 16 + max(2 * hidden, hidden + 4 * scales), 4 * scales + 2 * hidden
                send = -(-max(max_tokens * message, num_experts * max_tokens * answer) // 16) * 16
                receive = -(-num_experts * max_tokens * max(message, answer) // 16) * 16
                total = 2 * (send + receive + -(-4 * num_experts // 128) * 128)
                hint = Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, 4, num_experts)
                assert hint == (total + 128) // 128 * 128 > total


def test_hints_beyond_64_bits_are_refused():
    with pytest.raises(deep_ep.ArgumentError, match="^Buffer.get_low_latency_rdma_size_hint: num_max_dispatch_tokens_per_rank, "):
        Buffer.get_low_latency_rdma_size_hint(2**40, 2**20, 4, 2**20)
    with pytest.raises(deep_ep.ArgumentError, match="^Config.get_nvl_buffer_size_hint: .*2.63"):
        Config(2**20).get_nvl_buffer_size_hint(2**60, 8)
    with pytest.raises(deep_ep.ArgumentError, match="^Config.get_nvl_buffer_size_hint: num_ranks = 0, allowed: >= 1"):
        Config().get_nvl_buffer_size_hint(16, 0)
    with pytest.raises(deep_ep.ArgumentError, match="hidden = 0"):
        Buffer.get_low_latency_rdma_size_hint(1, 0, 1, 1)
