// The command that exports a checkpoint, to be copied.
for (const button of document.querySelectorAll(".copy")) {
  const [code, said] = [button.previousElementSibling, button.nextElementSibling];
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(code);
    navigator.clipboard.writeText(code.textContent).then(
      () => (said.textContent = "Copied."),
      () => (said.textContent = "The browser does not allow it: the command is selected, press Ctrl+C."),
    );
  });
}
