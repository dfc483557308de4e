// Pages work without this script: it copies commands, and shows in them what is typed into the form's fields.
"use strict";
(() => {
  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\"'\"'") + "'");
  const field = (part) => /^\{([A-Za-z_]\w*)\}$/.exec(part)?.[1];

  function shown(code) {
    const form = code.closest("form");
    return JSON.parse(code.dataset.command).map((part) => {
      const name = field(part);
      if (!name) return quoted(part);
      const value = form && new FormData(form).get(name);
      return value ? quoted(String(value)) : name.toUpperCase();
    }).join(" ");
  }

  function prepare(node) {
    for (const button of node.querySelectorAll("button[data-copy]")) button.hidden = !navigator.clipboard;
    for (const code of node.querySelectorAll("code[data-command]")) code.textContent = shown(code);
  }

  document.addEventListener("input", (event) => {
    for (const code of event.target.closest("form")?.querySelectorAll("code[data-command]") ?? []) code.textContent = shown(code);
  });

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-copy]");
    if (!button) return;
    await navigator.clipboard.writeText(button.closest(".command").querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });

  document.addEventListener("htmx:after:swap", () => prepare(document));
  prepare(document);
})();
