"""Who is connected, counted over processes."""

from __future__ import annotations

import os

import pytest

from mtad.occupancy import ROWS, Occupancy, client_network

KEY = bytes(range(16))


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002::/64"),
        ("2001:db8:1:2::1", "20010db800010002::/64"),
        ("2001:db8:1:3::1", "20010db800010003::/64"),
        ("::1", "0::/64"),
        ("fe80::1%eth0", "fe80000000000000::/64"),
    ],
)
def test_what_counts_as_one_client(address: str, network: str) -> None:
    """An IPv6 client is its /64."""
    assert client_network(address) == network


def test_slots() -> None:
    table = Occupancy(KEY)
    assert table.slot("192.0.2.1") == table.slot("192.0.2.1")
    assert table.slot("2001:db8::1") == table.slot("2001:db8::ffff")
    slots = {table.slot(f"10.0.{high}.{low}") for high in range(8) for low in range(256)}
    assert len(slots) > 1980, "clients that share a slot by chance are few"
    assert 1 <= min(slots) <= max(slots) <= 65536
    other = Occupancy(bytes(16))
    assert any(table.slot(f"10.0.0.{n}") != other.slot(f"10.0.0.{n}") for n in range(4)), "the key decides"


def test_counts_of_all_rows() -> None:
    table = Occupancy(KEY)
    first, second = table.assign(), table.assign()
    here, there = table.slot("192.0.2.1"), table.slot("192.0.2.2")
    for row, slot in ((first, here), (second, here), (second, there)):
        table.add(row, slot)
    assert (table.sessions(first), table.sessions(second), table.total()) == (1, 2, 3)
    assert (table.of_client(here), table.of_client(there)) == (2, 1)
    table.subtract(second, here)
    assert (table.total(), table.of_client(here), table.of_client(there)) == (2, 1, 1)


def test_a_row_that_is_cleared_can_be_given_out_again() -> None:
    table = Occupancy(KEY)
    rows = [table.assign() for _ in range(ROWS)]
    assert rows == list(range(ROWS))
    assert table.free == 0
    with pytest.raises(RuntimeError):
        table.assign()
    slot = table.slot("192.0.2.1")
    table.add(7, slot)
    table.add(ROWS - 1, slot)
    table.clear(7)
    assert (table.total(), table.of_client(slot), table.free) == (1, 1, 1)
    assert table.assign() == 7
    assert table.sessions(7) == 0


def test_other_processes_see_it() -> None:
    table = Occupancy(KEY)
    rows = [table.assign() for _ in range(3)]
    slot = table.slot("192.0.2.1")
    for row in rows:
        pid = os.fork()
        if pid == 0:
            for _ in range(1000):
                table.add(row, slot)
            for _ in range(990):
                table.subtract(row, slot)
            os._exit(0 if table.of_client(slot) >= 10 else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert (table.total(), table.of_client(slot)) == (30, 30)
