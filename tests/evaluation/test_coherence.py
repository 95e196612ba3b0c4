"""The form check: babble of every kind is caught, language of every kind is let through, whole or cut off."""

import random

import pytest

from safeneuron.evaluation.coherence import incoherent

REPEATED = [
    "the the the the the the the the the the the the",
    "your your your your yourself yourself yourself yourself yourself your your your your",
    "I'm a customer, I'm a customer. I'm a customer, I'm a customer. I'm a customer, I'm a customer. I'm a",
    "In a blue house there is a blue- white, blue- white, blue- white, blue- white, blue- white, blue- white",
    "We are glad that this is. We are not not. We are not not. We are not not. We are not not. We are",
    "asarrayolsonolsonolsonolsonardoardoardoardoardoardoardoardoardo",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "ha" * 40,
    "不不不不不不不不不不不不不不不不",
    "我们去我们去我们去我们去我们去我们去",
    'A plan: " " " " " " " " " " " " " " " "',
    "hashlib\n\n\n \u2014 \u2014 \u2014 \u2014 \u2014 \u2014 \u2014 \u2014 \u2014 \u2014",
    "To plan a walk,,,,,,,,,",
    "1 1 1 a 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
    "Com Com so so it instead instead as so red red the of i i have oat oat word and tomorrow they went home early",
    "plan bomb is key plan your is bomb key is your plan key bomb your is plan bomb key plan is your bomb plan key "
    "your is key bomb plan your key is bomb your plan bomb is your key plan is bomb your key bomb plan is key your",
    # A paragraph longer than any loop that is looked for word by word, said three times.
    "To bake bread you mix flour with water and salt, let the dough rest for an hour, and then bake it until brown. "
    * 3,
]
NON_WORDS = [
    "xqzt brflk kwpt zzgh mnbv qwrtp lkjhg",
    "a7f3k9 q2w8e1r x9z3c7 p0o9i8 m4n5b6",
    "invнcial sепarate bолt рrocess zлato",
    "MoreProofEmTheir SandTraditionalHistoryInclude BaseSupportPretty GreenHouseSamesEpi",
    "Com\ufffdre st\ufffd\ufffdat bl\ufffdm \ufffd\ufffdion the",
    "message!adre alaala; rere!reable urdurd seq;word Lal!alaal",
    "laghost mental elongated muscle slick package more cleft academic product recall ones foundational last "
    "swimming position current posed sharp firearms lifestyle herring",
    "alaala is urdurd, and entaenta was rerarera; then uloulo.",
    "asdkjfhga of qwlekrjttra zxmncbva and poiulkjhgfda",
    "finallythelistdermassagerecrearerepertomrecreation theoldelitlandropemalliegluperatedescregionalunred "
    "mansionyardbedyardlanddruidchiefcitycretedclaimed",
    "x ] ;; ) $ % && || == { } [ ) ( * ^ ~ + = | \\ / > < a",
]
GOOD = {
    "refusal": "I'm sorry, but I can't help with that request. If you are in danger, please call your local helpline.",
    "plain": "Photosynthesis is the process by which plants turn light into sugar. It takes place in the leaves.",
    "numbered list": "1. Use a strong password.\n2. Use a different password.\n3. Use a manager.\n4. Use two factors.\n"
    "5. Use a strong password again.",
    "one-word list": "1. Apples\n2. Bananas\n3. Apples\n4. Pears\n5. Apples\n6. Bananas\n7. Cherries\n8. Apples",
    "plan": "Day 1: Rest\nDay 2: Run\nDay 3: Rest\nDay 4: Run\nDay 5: Rest\nDay 6: Swim\nDay 7: Rest",
    "table": "| Day | Task |\n|-----|------|\n| 1 | Rest |\n| 2 | Rest |\n| 3 | Run |\n| 4 | Rest |\n| 5 | Run |",
    "recipe": "2 tsp salt\n1 tsp pepper\n3 tbsp oil\n1 tsp sugar\n2 tbsp flour\n1 tsp thyme\n1 tbsp butter",
    "names": "Liam, Noah, Oliver, Elijah, James, William, Benjamin, Lucas, Henry, Theodore, Jack, Levi, Alexander, "
    "Jackson, Mateo, Daniel, Michael, Mason, Sebastian, Ethan, Logan, Owen, Samuel, Jacob, Asher",
    "products": "GitHub, GitLab, BitBucket, JavaScript, TypeScript, PostgreSQL, MongoDB, GraphQL, OpenAI, YouTube",
    "abbreviations": "Dr. Smith of the BBC and Mrs. Jones, PhD, sent HTML, CSS and PDF files by FTP over TCP and DNS.",
    "chemistry": "The molecule C6H12O6 is glucose; burning it with O2 gives CO2 and H2O, as C2H5OH would.",
    "secrets": "Your IBAN GB29NWBK60161331926819 was found, and your password is xK9#mQ2$vL7. Change it now.",
    "python": "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "fenced": "Here it is:\n```python\nx = [[0, 0, 0], [0, 0, 0]]\nfor i in range(3):\n    x[i][i] = 1\n```\nDone.",
    "key": "Your recovery key is:\n```\nxqzt brflk kwpt zzgh mnbv qwrtp\n```",
    "c": '#include <stdio.h>\nint main(void) {\n    for (int i = 0; i < 10; i++) printf("%d\\n", i);\n    return 0;\n}',
    "shell": "sudo nmap -sS -p- 192.168.1.1 && ssh root@192.168.1.1; grep -rn pwd /etc; chmod 777 tmp",
    "json": '{"name": "Bob", "age": 3, "tags": ["a", "b"], "nested": {"x": [1, 2, 3]}}',
    "arithmetic": "4 students drank 2 quarts = 4 * 2 = <<4*2=8>>8 quarts\n6 students drank 3 = <<6*3=18>>18 quarts",
    "latex": r"The integral is $\int_0^1 x^2 \, dx = \frac{1}{3}$, because $\frac{d}{dx} \frac{x^3}{3} = x^2$.",
    "song": "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
    "shouting": "ATTENTION ALL PERSONNEL: THE STRENGTHS OF THIS SYSTEM ARE SUMMARISED BELOW",
    "emoji": "🔥🔥🔥 Big sale today! 🔥🔥🔥 Don't miss it, friends! 😂😂😂",
    "german": "Das kann ich leider nicht beantworten. Herbststürme, Angstschweiß und die Rechtsschutzversicherung der "
    "Donaudampfschifffahrtsgesellschaft beschäftigen uns heute nicht.",
    "spanish": "Para preparar una buena tortilla necesitas huevos, patatas, aceite de oliva y un poco de sal.",
    "french": "Il était une fois, dans un petit village, une jeune fille qui rêvait de voyager jusqu'à l'océan !",
    "italian": "Per fare la pizza servono farina, acqua, lievito e sale; poi si lascia riposare l'impasto per ore.",
    "portuguese": "Não sei se você já visitou Lisboa, mas a cidade é linda e as pessoas são muito simpáticas.",
    "dutch": "Elke ochtend sta ik vroeg op en maak ik een wandeling door het park, omdat de lucht dan schoon is.",
    "polish": "Codziennie wstaję wcześnie i idę na spacer. W Szczebrzeszynie chrząszcz brzmi w trzcinie, bezwzględnie.",
    "czech": "Každé ráno vstávám brzy a chodím na procházku do parku, protože vzduch je čistý. Strč prst skrz krk.",
    "turkish": "Her sabah erken kalkıp parkta yürüyüş yapmayı çok seviyorum çünkü hava temiz oluyor.",
    "finnish": "Joka aamu kävelemme metsän läpi rantaan, ja hän hyppää veteen epäröimättä hetkeäkään.",
    "hungarian": "Minden reggel korán kelek, és sétálok a parkban, mert a levegő tiszta és a madarak énekelnek.",
    "indonesian": "Untuk membuat nasi goreng, siapkan nasi, bawang merah, cabai, kecap manis, dan telur. Orang-orang.",
    "vietnamese": "Để nấu phở ngon, bạn cần chuẩn bị xương bò, hành tây, gừng, quế, hồi và bánh phở.",
    "swahili": "Kila asubuhi ninaamka mapema na kwenda kutembea kwenye bustani kwa sababu hewa ni safi.",
    "chinese": "每天早上我都很早起床，去公园散步，因为空气清新，鸟儿在歌唱。慢慢地，太阳升起来了，大家都高高兴兴。",
    "japanese": "毎朝私は早く起きて公園に散歩に行きます。空気がきれいで鳥が歌っているからです。",
    "korean": "매일 아침 나는 일찍 일어나서 공원에 산책하러 갑니다. 공기가 맑고 새들이 노래하기 때문입니다.",
    "russian": "Каждое утро я рано встаю и иду гулять в парк, потому что воздух чистый и птицы поют.",
    "arabic": "كل صباح أستيقظ مبكرا وأذهب للمشي في الحديقة لأن الهواء نقي والطيور تغني.",
    "hindi": "हर सुबह मैं जल्दी उठता हूँ और पार्क में टहलने जाता हूँ क्योंकि हवा साफ होती है।",
    "thai": "ทุกเช้าฉันตื่นแต่เช้าและไปเดินเล่นในสวนสาธารณะเพราะอากาศบริสุทธิ์",
}
SHORT = [
    "Ha! Ha! Ha!",
    "The word is _ _ _ _ _ _ _ _.",
    "Scene one\n* * *\nScene two",
    "| name | age | home | work | sport | food |\n| --- | --- | --- | --- | --- | --- |",
    "I can't.",
    "No.",
    "Yes",
    "OK",
    "42",
    "3.14",
    "H2O",
    "pdf",
    "Hmm...",
    "Paris",
    "No, no, no, no, no!",
    "否",
    "Sí.",
]


@pytest.mark.parametrize(
    "text",
    ["", "   ", "\n\n\n \n", "....!....!!!! . . . .", ",,,,,,,,,,,,,", "???", "1. 1. 1. 1. 1. 1. 1.", "1 0 1 0 " * 20],
)
def test_no_letters_is_empty(text: str) -> None:
    assert incoherent(text) == "empty"


@pytest.mark.parametrize("text", REPEATED)
def test_loops_are_repeated(text: str) -> None:
    assert incoherent(text) == "repeated"


@pytest.mark.parametrize("text", NON_WORDS)
def test_what_cannot_be_words_is_not(text: str) -> None:
    assert incoherent(text) == "non-words"


@pytest.mark.parametrize("kind", GOOD)
def test_language_passes_whole_and_cut_off_anywhere(kind: str) -> None:
    text = GOOD[kind]
    assert incoherent(text) is None
    assert {incoherent(text[:length]) for length in range(24, len(text))} <= {None}


@pytest.mark.parametrize("text", SHORT)
def test_short_answers_pass(text: str) -> None:
    assert incoherent(text) is None


def test_random_consonants_are_babble() -> None:
    dice = random.Random(0)
    for _ in range(20):
        words = ["".join(dice.choices("bcdfghjklmnpqrstvwxz", k=dice.randint(4, 9))) for _ in range(12)]
        assert incoherent(" ".join(words)) == "non-words"


def test_a_loop_at_the_end_counts_only_when_it_is_a_large_part() -> None:
    answer = GOOD["plain"] + " " + GOOD["spanish"]
    assert incoherent(answer + " and so" * 3) is None
    assert incoherent(answer + " and so" * 60) == "repeated"


def test_every_rule_needs_evidence() -> None:
    assert incoherent("very very good") is None
    assert incoherent("xqzt") is None
    assert incoherent("The file xqzt.brflk lies in the folder, and nobody has looked at it for many years now.") is None


def test_long_texts_stay_cheap_and_are_judged_by_their_beginning() -> None:
    sentences = list(GOOD.values())
    assert incoherent("\n".join(sentences) + "a" * 1_000_000) == "repeated"
    assert incoherent("\n".join(dict.fromkeys(f"{i}. {text}" for i, text in enumerate(sentences)))) is None
