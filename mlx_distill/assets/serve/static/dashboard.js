// Pages work without this script: it copies commands, and shows in them what is typed into the form's fields.
"use strict";
(() => {
  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\"'\"'") + "'");
  const part = /^(?:(--[\w-]+)\?)?(?:\{([A-Za-z_]\w*)\}|(?<=\?)([A-Za-z_]\w*))$/;

  // As CommandLine.words in pages/environment.py: {name}, --option?{name} and --flag?name follow the form's fields.
  function shown(code) {
    const fields = new FormData(code.closest("form") ?? undefined);
    return JSON.parse(code.dataset.command).flatMap((word) => {
      const [whole, option, name, flag] = part.exec(word) ?? [];
      if (!whole) return [quoted(word)];
      const value = String(fields.get(name ?? flag) ?? "").trim();
      if (!option) return [value ? quoted(value) : name.toUpperCase()];
      if (!value) return [];
      return name ? [option, quoted(value)] : [option];
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
