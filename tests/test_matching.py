"""Rows of the last layer are mapped to the data set's classes by name."""

import pytest

from fasttrain import matching
from fasttrain.matching import ClassError, Known

TWELVE = tuple(f"n{number:08d}" for number in range(1, 13))
NUMBERS = sorted(str(number) for number in range(12))  # as text: 0, 1, 10, 11, 2, ...


def evaluated(names: tuple[str, ...] | None, data: list[str], number: int = 12) -> matching.Match:
    return matching.to_evaluate(Known(len(names) if names else number, names), data)


def test_equal_class_names_match_without_a_message() -> None:
    assert evaluated(TWELVE, list(TWELVE)) == (list(range(12)), "")


def test_some_of_the_names_or_another_order_are_found_by_name_and_told() -> None:
    rows, said = evaluated(TWELVE, [TWELVE[7], TWELVE[2]])
    assert rows == [7, 2] and said == "evaluating 2 of the network's 12 classes, found by name"
    rows, said = evaluated(TWELVE, list(reversed(TWELVE)))
    assert rows == list(range(11, -1, -1)) and said.endswith("found by name in another order")


def test_numbers_as_folder_names_are_refused_until_they_are_said_to_be_numbers() -> None:
    with pytest.raises(ClassError) as error:
        evaluated(TWELVE, NUMBERS)
    assert "(0, 1, 10, ...), and they are sorted as text, where 10 comes before 2" in str(
        error.value
    )
    assert "add --classes-by-number" in str(error.value)
    rows, said = matching.to_evaluate(Known(12, TWELVE), NUMBERS, by_number=True)
    assert rows == [int(name) for name in NUMBERS]
    assert said == ("classes by number: 0 is n00000001, 1 is n00000002, 10 is n00000011, ...")


def test_some_of_the_numbers_are_names_too() -> None:
    """The data has 3 of the 4 angles that a network knows, in another order."""
    known = Known(4, ("0", "180", "270", "90"))
    assert matching.to_evaluate(known, ["0", "270", "90"]).rows == [0, 2, 3]
    assert matching.to_evaluate(known, ["0", "270", "90"], by_number=True).rows == [0, 2, 3]


def test_numbers_of_the_network_match_names_of_the_data_only_by_number() -> None:
    """The network was trained on tars with numbers as labels, the data are named folders."""
    known = Known(12, tuple(f"{number:06d}" for number in range(12)))
    with pytest.raises(ClassError, match="the network's class names are numbers"):
        matching.to_evaluate(known, TWELVE)
    assert matching.to_evaluate(known, TWELVE, by_number=True).rows == list(range(12))
    # Both numbers, one written with zeros: text does not match, numbers do.
    with pytest.raises(ClassError, match="add --classes-by-number"):
        matching.to_evaluate(known, NUMBERS)
    assert matching.to_evaluate(known, NUMBERS, by_number=True).rows[2] == 10


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["1", "12"], "the data has a class 12, but the network's classes go from 0 to 11"),
        (["1", "01"], "two class names are the same number"),
        (["ant", "bee"], "the class names are not numbers (ant, bee); leave the option"),
    ],
)
def test_unusable_class_numbers_are_refused(data: list[str], said: str) -> None:
    with pytest.raises(ClassError) as error:
        matching.to_evaluate(Known(12, TWELVE), data, by_number=True)
    assert said in str(error.value)


def test_other_names_are_refused_and_the_first_are_shown() -> None:
    with pytest.raises(ClassError) as error:
        evaluated(("ant", "bee", "cat", "dog"), ["bee", "elm", "fir", "oak", "yew"])
    assert str(error.value).startswith(
        "4 of the data's 5 classes are unknown to the network: elm, fir, oak, ...; it was trained "
        "on 4: ant, bee, cat, ..."
    )
    assert len(str(error.value).splitlines()) == 2


def test_weights_without_names_are_matched_by_position() -> None:
    rows, said = evaluated(None, list("abc"), number=3)
    assert rows == [0, 1, 2] and "taken as the network's class i of 3" in said
    with pytest.raises(ClassError, match="sorted as text, where 10 comes before 2"):
        evaluated(None, NUMBERS)
    rows, _ = matching.to_evaluate(Known(12), NUMBERS, by_number=True)
    assert rows == [int(name) for name in NUMBERS]
    with pytest.raises(ClassError, match="has 1,000 classes without names, but the data has 3"):
        evaluated(None, list("abc"), number=1000)


def test_a_thousand_unnamed_classes_are_imagenets_where_the_data_has_its_names() -> None:
    names = matching.imagenet()
    assert len(set(names)) == 1000 and list(names) == sorted(names)
    imagenette = "n01440764 n02102040 n02979186 n03000684 n03028079".split()
    imagenette += "n03394916 n03417042 n03425413 n03445777 n03888257".split()
    rows, said = evaluated(None, imagenette, number=1000)
    assert rows == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert said == "evaluating 10 of the network's 1,000 classes, found by name"
    assert evaluated(None, list(names), number=1000) == (list(range(1000)), "")


def test_starting_takes_over_what_has_a_name_and_renews_the_rest() -> None:
    known = Known(4, ("ant", "bee", "cat", "dog"))
    assert matching.to_start_from(known, known.names or ()) == ([0, 1, 2, 3], "")
    assert matching.to_start_from(known, ["cow", "dog", "ant"]) == (
        [None, 3, 0],
        "the last layer is kept for 2 of 3 classes, found by name: the weights have 4 classes, "
        "the data 3",
    )
    assert matching.to_start_from(known, ["elm", "oak"]) == (
        [None, None],
        "the last layer is new: the weights have 4 classes, the data 2, and no name is in both",
    )


def test_unnamed_rows_are_kept_if_the_numbers_of_classes_are_equal() -> None:
    rows, said = matching.to_start_from(Known(2), ["elm", "oak"])
    assert (
        rows == [0, 1] and said == "the last layer is kept: the weights have 2 classes too, unnamed"
    )
    assert matching.to_start_from(Known(3), ["elm", "oak"]).rows == [None, None]
    assert matching.to_start_from(Known(0), ["elm", "oak"]) == (
        [None, None],
        "the last layer is new: the weights have none",
    )
    with pytest.raises(ClassError, match="the weights have no last layer"):
        matching.to_evaluate(Known(0), ["elm", "oak"])
    assert matching.to_start_from(Known(1000), ["n01443537", "oak"]).rows == [None, None]


def test_differences_name_the_first() -> None:
    assert matching.differences("abc", "abc") == ""
    assert matching.differences("abc", "abcd") == "3 classes there, 4 here"
    assert matching.differences("abc", "abd") == (
        "3 classes there, 3 here; class 2 is c there and d here"
    )
