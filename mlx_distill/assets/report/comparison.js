// Shows 50 cases at a time, and filters them. It computes no figure: without it every figure is there too.
(() => {
  "use strict";
  const table = document.getElementById("case-table");
  const rest = document.getElementById("more-cases");
  if (!table) return;
  const size = 50;
  const cases = [...table.tBodies, ...(rest ? rest.content.children : [])];
  const form = document.getElementById("case-filters");
  const count = document.getElementById("case-count");
  const fields = [...form.elements].filter((field) => field.name);
  let texts = null;
  let page = 0;
  let shown = cases;

  const value = (name) => form.elements[name] ? form.elements[name].value : "";

  function matches(one, query) {
    return (!value("show") || one.dataset.c === value("show"))
      && (!value("truth") || one.dataset.t === value("truth"))
      && (!value("a") || one.dataset.a === value("a"))
      && (!value("b") || one.dataset.b === value("b"))
      && (!query || texts.get(one).includes(query));
  }

  function show() {
    const last = Math.max(0, Math.ceil(shown.length / size) - 1);
    page = Math.min(Math.max(page, 0), last);
    const first = page * size;
    const visible = shown.slice(first, first + size);
    [...table.tBodies].forEach((one) => one.remove());
    table.append(...visible);
    count.textContent = shown.length
      ? `${first + 1}–${first + visible.length} of ${shown.length}`
      : "no row";
    form.elements.back.disabled = page === 0;
    form.elements.next.disabled = page === last;
  }

  function remember() {
    const query = new URLSearchParams();
    fields.forEach((field) => field.value && query.set(field.name, field.value));
    if (page) query.set("page", page + 1);
    try {
      history.replaceState(null, "", `#cases?${query}`);
    } catch { /* a viewer that has no addresses */ }
  }

  function filter(start) {
    const query = value("q").trim().toLowerCase();
    if (query && !texts) texts = new Map(cases.map((one) => [one, one.textContent.toLowerCase()]));
    shown = cases.filter((one) => matches(one, query));
    page = start;
    show();
  }

  function read() {
    if (!location.hash.startsWith("#cases?")) return false;
    const query = new URLSearchParams(location.hash.slice(7));
    fields.forEach((field) => { field.value = query.get(field.name) || ""; });
    filter((parseInt(query.get("page"), 10) || 1) - 1);
    document.getElementById("cases").scrollIntoView();
    return true;
  }

  function turn(step) { page += step; show(); remember(); }

  form.addEventListener("input", () => { filter(0); remember(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.back.addEventListener("click", () => turn(-1));
  form.elements.next.addEventListener("click", () => turn(1));
  window.addEventListener("hashchange", read);
  // A cell of a confusion matrix shows its rows; the selects hold the labels in the order of the matrix.
  document.querySelectorAll("#confusion table.matrix").forEach((matrix, side) => {
    [...matrix.tBodies[0].rows].forEach((row, truth) => {
      row.querySelectorAll("td.yes, td.no").forEach((cell, answer) => {
        cell.style.cursor = "pointer";
        cell.addEventListener("click", () => {
          fields.forEach((field) => { field.value = ""; });
          form.elements.truth.selectedIndex = truth + 1;
          form.elements[side ? "b" : "a"].selectedIndex = answer + 1;
          filter(0);
          remember();
          document.getElementById("cases").scrollIntoView();
        });
      });
    });
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const bodies = [...table.tBodies];
    const at = bodies.indexOf(document.activeElement.closest("tbody"));
    if (event.key === "j" || event.key === "k") {
      const next = bodies[Math.min(Math.max(at + (event.key === "j" ? 1 : -1), 0), bodies.length - 1)];
      if (next) next.rows[0].focus();
    } else if (event.key === "f" || event.key === "b") {
      const wanted = form.elements.show.options[event.key === "f" ? 1 : 2].value;
      form.elements.show.value = value("show") === wanted ? "" : wanted;
      filter(0);
      remember();
    }
  });
  form.hidden = false;
  if (!read()) filter(0);
})();
