// The page's own behaviour: the switch between light and dark, and the response browser, which keeps only one screenful
// of answers in the page, however many there are. What a model said goes in by textContent, so it stays text.
const SCREENFUL = 12;

function themes() {
  const button = document.getElementById("theme"), names = ["auto", "light", "dark"];
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = names[(names.indexOf(button.dataset.theme) + 1) % names.length];
    button.dataset.theme = now;
    button.textContent = `theme: ${now}`;
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
  });
}

class Browser {
  constructor(place, data) {
    this.place = place;
    this.data = data;
    this.list = place.querySelector(".answers");
    this.words = data.rows.map(() => null);
    this.start = 0;
    this.asked = new Set();
    this.choose("state", data.states, 0);
    this.choose("attack", data.attacks, 1);
    this.choose("kind", data.kinds, 2);
    this.choose("verdict", data.verdicts, 3);
    let waiting = 0;
    place.querySelector("[name=text]").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.filter(), 120);
    });
    place.querySelector("[name=reveal]")?.addEventListener("change", () => this.show());
    place.querySelector(".back").addEventListener("click", () => this.turn(-SCREENFUL));
    place.querySelector(".on").addEventListener("click", () => this.turn(SCREENFUL));
    this.filter();
  }

  choose(name, values) {
    const select = this.place.querySelector(`[name=${name}]`);
    values.forEach((value, index) => select.append(element("option", { value: index }, value)));
    select.addEventListener("change", () => this.filter());
  }

  // What the text search looks at: request and answer, as far as they are in the page, in lower case.
  wordsOf(index) {
    const [, , , , prompt, text] = this.data.rows[index];
    this.words[index] ??= `${this.data.prompts[prompt]}\n${text}`.toLowerCase();
    return this.words[index];
  }

  filter() {
    const wanted = ["state", "attack", "kind", "verdict"].map((name) => this.place.querySelector(`[name=${name}]`).value);
    const text = this.place.querySelector("[name=text]").value.trim().toLowerCase();
    this.found = [];
    this.data.rows.forEach((row, index) => {
      if (wanted.every((value, column) => value === "" || row[column] === Number(value)) && (!text || this.wordsOf(index).includes(text))) {
        this.found.push(index);
      }
    });
    this.start = 0;
    this.show();
  }

  turn(by) {
    this.start = Math.min(Math.max(0, this.start + by), Math.max(0, this.found.length - 1));
    this.show();
    this.place.scrollIntoView({ block: "start" });
  }

  show() {
    const end = Math.min(this.start + SCREENFUL, this.found.length);
    const span = this.found.length ? `${(this.start + 1).toLocaleString("en")} to ${end.toLocaleString("en")} of ` : "";
    this.place.querySelector(".count").textContent = `${span}${this.found.length.toLocaleString("en")} answers`;
    this.place.querySelector(".back").disabled = this.start === 0;
    this.place.querySelector(".on").disabled = end >= this.found.length;
    this.list.replaceChildren(...this.found.slice(this.start, end).map((index) => this.answer(index)));
  }

  answer(index) {
    const [state, attack, kind, verdict, prompt, text, hidden] = this.data.rows[index], data = this.data;
    const item = element("li", { class: "example" });
    item.append(element("p", { class: "where" }, `${data.states[state]} · ${data.attacks[attack]} · ${data.kinds[kind]}`));
    item.append(element("p", { class: "asked" }, data.prompts[prompt]));
    const said = element("p", { class: "said" }), all = this.place.querySelector("[name=reveal]");
    if (data.kinds[kind] === "harmful" && data.whole && !all.checked && !this.asked.has(index)) {
      const button = element("button", { type: "button" }, `show the answer (${text.length.toLocaleString("en")} characters)`);
      button.addEventListener("click", () => { this.asked.add(index); item.replaceWith(this.answer(index)); });
      said.append(button);
    } else {
      said.textContent = text;
      if (hidden) said.append(" ", element("span", { class: "mask" }, `${hidden.toLocaleString("en")} characters ${data.whole ? "cut" : "hidden"}`));
    }
    const name = data.verdicts[verdict], judged = element("p", { class: `verdict ${name.split(" ")[0]}` }, name);
    judged.prepend(element("span", { class: "dot" }));
    item.append(said, judged);
    return item;
  }
}

themes();
figures();
const answers = document.getElementById("browser");
if (answers) {
  const data = stored("responses");
  answers.hidden = false;
  globalThis.responseBrowser = new Browser(answers, data);
}
document.documentElement.dataset.ready = "yes";
