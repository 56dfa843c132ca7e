// The table of trials can be sorted by its columns and filtered by words. Without scripts it is a table all the same.
(function () {
  "use strict";
  var table = document.getElementById("trial-table");
  var body = table.tBodies[0];
  var heads = Array.prototype.slice.call(table.tHead.rows[0].cells);
  var filter = document.getElementById("filter");
  var status = document.getElementById("shown");

  function rows() {
    return Array.prototype.slice.call(body.rows);
  }

  function valueOf(row, column) {
    var cell = row.cells[column];
    var text = cell.hasAttribute("data-value") ? cell.getAttribute("data-value") : cell.textContent.trim();
    return text !== "" && isFinite(Number(text)) ? Number(text) : text;
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") { return a - b; }
    if (typeof a !== typeof b) { return typeof a === "number" ? -1 : 1; }
    return a < b ? -1 : a > b ? 1 : 0;
  }

  function sortBy(column, descending) {
    var entries = rows().map(function (row, place) { return { row: row, value: valueOf(row, column), place: place }; });
    entries.sort(function (a, b) {
      if ((a.value === "") !== (b.value === "")) { return a.value === "" ? 1 : -1; } // what is not known comes last
      return (descending ? compare(b.value, a.value) : compare(a.value, b.value)) || a.place - b.place;
    });
    entries.forEach(function (entry) { body.appendChild(entry.row); });
    heads.forEach(function (head, i) {
      head.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending");
    });
  }

  heads.forEach(function (head, column) {
    var button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.textContent = "";
    head.appendChild(button);
    head.setAttribute("aria-sort", head.getAttribute("aria-sort") || "none");
    button.addEventListener("click", function () {
      var now = head.getAttribute("aria-sort");
      sortBy(column, now === "none" ? head.classList.contains("n") : now === "ascending");
    });
  });

  function applyFilter() {
    var words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    var shown = 0;
    rows().forEach(function (row) {
      var text = row.textContent.toLowerCase();
      row.hidden = !words.every(function (word) { return text.indexOf(word) >= 0; });
      shown += row.hidden ? 0 : 1;
    });
    status.textContent = shown + " of " + body.rows.length + " trials";
  }

  document.getElementById("tools").hidden = false;
  filter.addEventListener("input", applyFilter);
  applyFilter();
})();
