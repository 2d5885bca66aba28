"""The page on validity is written by the script that it names."""

import tables


def test_every_table_has_its_place_on_the_page_and_is_filled():
    page = tables.PAGE.read_text(encoding="utf-8")
    for name in tables.TABLES:
        body = page.split(f"<!-- {name} -->")[1].split(f"<!-- end {name} -->")[0]
        assert body.count("\n|") >= 4, name


def test_writing_a_table_changes_nothing_else(tmp_path, monkeypatch):
    page = tmp_path / "validity.md"
    page.write_text("before\n<!-- null -->\nold\n<!-- end null -->\nafter <!-- power -->\n", encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", page)
    tables.write("null", ["| a |", "|---|"])
    after = "before\n<!-- null -->\n\n| a |\n|---|\n\n<!-- end null -->\nafter <!-- power -->\n"
    assert page.read_text(encoding="utf-8") == after
