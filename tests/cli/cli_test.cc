// The tool as its users start it: arguments, exit codes, JSON, and one small job from end to end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

struct Outcome {
  int code = -1;
  std::string out, err;
};

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

class Cli : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "anyep-cli-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  /// `before`: variables for the tool, such as "ANYEP_CHECK=1".
  Outcome run(const std::string& arguments, const std::string& before = {}) const {
    const std::filesystem::path err = folder_ / "err";
    const std::string command = "cd '" + folder_.string() + "' && " + before + " " + ANYEP_CLI_PATH + " " + arguments +
                                " 2>'" + err.string() + "'";
    Outcome outcome;
    FILE* const pipe = popen(command.c_str(), "r");
    std::array<char, 4096> buffer{};
    while (const std::size_t got = fread(buffer.data(), 1, buffer.size(), pipe)) outcome.out.append(buffer.data(), got);
    const int status = pclose(pipe);
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    outcome.err = read_file(err);
    return outcome;
  }

  std::filesystem::path folder_;
};

constexpr const char* kSmall = "--hidden 128 --experts 16 --topk 4 --ranks 2 --quiet ";

TEST_F(Cli, HelpTeachesAndSucceeds) {
  const Outcome help = run("--help");
  EXPECT_EQ(help.code, 0);
  EXPECT_THAT(help.out, HasSubstr("Exit codes"));
  for (const char* command : {"run", "bench", "plan", "layout", "doctor", "info"}) {
    EXPECT_THAT(help.out, HasSubstr(command));
    const Outcome of_command = run(std::string(command) + " --help");
    EXPECT_EQ(of_command.code, 0) << command;
  }
}

TEST_F(Cli, BadArgumentsGiveCodeTwoAndSayWhy) {
  struct Case {
    const char* arguments;
    const char* says;
  };
  for (const Case& one :
       {Case{"", "subcommand"}, Case{"dance", "dance"}, Case{"run --ranks 0", "--ranks"},
        Case{"run --model gpt-1", "gpt-1"}, Case{"run --text missing.txt", "missing.txt"},
        Case{"run --threads --processes", "excludes"}, Case{"plan --hidden 12", "--hidden"},
        Case{"plan --experts 4 --topk 8", "--topk"}, Case{"plan --rows-bytes 5X", "--rows-bytes"},
        Case{"plan --op fly", "fly"}, Case{"bench -b 8 -e 4", "-e"}, Case{"bench --op nothing", "nothing"},
        Case{"bench --late 0", "--late"}, Case{"bench --late soon", "--late"},
        Case{"bench --profile unknown", "unknown"}, Case{"bench --trace missing.txt", "missing.txt"},
        Case{"layout --dtype int3", "int3"}, Case{"info --colour", "--colour"}}) {
    const Outcome outcome = run(one.arguments);
    EXPECT_EQ(outcome.code, 2) << one.arguments << "\n" << outcome.out << outcome.err;
    EXPECT_THAT(outcome.out + outcome.err, HasSubstr(one.says)) << one.arguments;
  }
}

TEST_F(Cli, GarbageInAVariableGivesCodeTwoAndTheDoctorShowsIt) {
  const Outcome plan = run("plan --copy-gbs 10", "ANYEP_TIMEOUT_S=soon");
  EXPECT_EQ(plan.code, 2);
  EXPECT_THAT(plan.err, HasSubstr("ANYEP_TIMEOUT_S"));
  const Outcome doctor = run("doctor", "ANYEP_TIMEOUT_S=soon");
  EXPECT_EQ(doctor.code, 0);
  EXPECT_THAT(doctor.out, HasSubstr("soon"));
}

TEST_F(Cli, JsonOfEveryCommandParses) {
  for (const char* arguments :
       {"info --json", "doctor --json", "layout --json", "plan --json --copy-gbs 10 --op combine",
        "plan --json --copy-gbs 10 --op low_latency_dispatch --tokens 64 --wire fp8 --hook"}) {
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.code, 0) << arguments << outcome.err;
    EXPECT_TRUE(Json::accept(outcome.out)) << arguments << "\n" << outcome.out;
  }
}

TEST_F(Cli, InfoKnowsEveryModelThatPlanTakes) {
  const Json info = Json::parse(run("info --json").out);
  ASSERT_GT(info.at("models").size(), 30U);
  for (const Json& model : info.at("models")) {
    const std::string name = model.at("name");
    const Outcome plan = run("plan --json --copy-gbs 10 --tokens 64 --model " + name);
    ASSERT_EQ(plan.code, 0) << name << plan.err;
    EXPECT_EQ(Json::parse(plan.out).at("hidden"), model.at("hidden")) << name;
  }
}

TEST_F(Cli, LayoutRangesTileTheirMap) {
  const Outcome outcome = run("layout --json --ranks 3 --experts 50 --topk 6 --dtype fp8");
  for (const Json& map : Json::parse(outcome.out)) {
    std::uint64_t at = 0;
    for (const Json& range : map.at("ranges")) {
      EXPECT_EQ(range.at("offset"), at) << map.at("name") << " " << range.at("name");
      at += range.at("bytes").get<std::uint64_t>();
    }
    EXPECT_EQ(map.at("bytes"), at) << map.at("name");
  }
}

TEST_F(Cli, TheMainJobIsRightAsProcessesAndAsThreads) {
  for (const char* how : {"--processes", "--threads"}) {
    const Outcome outcome =
        run(std::string("run --json --tokens 100 --decode-steps 2 --decode-tokens 3 ") + kSmall + how);
    ASSERT_EQ(outcome.code, 0) << how << outcome.out << outcome.err;
    const Json report = Json::parse(outcome.out);
    EXPECT_EQ(report.at("wrong"), 0);
    EXPECT_GT(report.at("compared"), 100 * 128);
    EXPECT_EQ(report.at("tokens"), 100);
    EXPECT_GT(report.at("ceiling_gbs"), 0);
    EXPECT_EQ(report.at("text"), "built-in text") << "an empty folder has no documents";
  }
}

TEST_F(Cli, TheMainJobTakesTheTextThatItIsGiven) {
  std::ofstream(folder_ / "words.txt") << "one two three four five six seven";
  const Outcome outcome =
      run(std::string("run --text words.txt --decode-steps 0 --ranks 3 --model gpt-oss-20b --quiet"));
  EXPECT_EQ(outcome.code, 0) << outcome.out << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("7 tokens of words.txt (7 words)"));
  EXPECT_THAT(outcome.out, HasSubstr("0 wrong: ok"));
}

TEST_F(Cli, BenchWritesRecordsAndReplaysTraces) {
  const std::string how = std::string("bench --json -n 2 -w 1 -b 4 -e 16 -f 4 ") + kSmall;
  const Outcome first = run(how + "--seed 7 --write-trace routing.txt");
  ASSERT_EQ(first.code, 0) << first.err;
  std::istringstream lines(first.out);
  int num_lines = 0;
  for (std::string line; std::getline(lines, line); ++num_lines) {
    const Json record = Json::parse(line);
    EXPECT_EQ(record.at("wrong"), 0) << line;
    EXPECT_GT(record.at("us_p50"), 0) << line;
    EXPECT_EQ(record.at("ranks"), 2) << line;
    for (const char* field :
         {"date", "gpu", "count", "driver", "cuda", "commit", "op", "kind", "dtype", "hidden", "topk", "experts", "sms",
          "us_p99", "wire_gbs", "ceiling_gbs", "ratio", "graph", "routing"}) {
      EXPECT_TRUE(record.contains(field)) << field;
    }
  }
  // Two sizes; dispatch twice and fresh or cached, BF16 and FP8, into two memories; combine; pairs.
  EXPECT_EQ(num_lines, 2 * (8 + 2 + 2));

  const Outcome replay = run(std::string("bench --json -n 1 -w 0 --op dispatch --dtype bf16 --memory caller ") +
                             kSmall + "--trace routing.txt --write-trace again.txt");
  ASSERT_EQ(replay.code, 0) << replay.err;
  EXPECT_EQ(Json::parse(replay.out).at("tokens"), 16);
  EXPECT_EQ(read_file(folder_ / "again.txt"), read_file(folder_ / "routing.txt"));
}

// Rule 8.8 of the measurements: one case with late ranks beside the aligned one.
TEST_F(Cli, BenchMeasuresLateRanksBesideAlignedOnes) {
  constexpr double kLate = 20'000;
  const Outcome outcome = run(std::string("bench --json -n 2 -w 0 -b 4 -e 4 --op combine,pair --dtype bf16 ") +
                              "--memory caller --late 10,20000 " + kSmall);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::map<std::string, std::vector<Json>> of_op;
  std::istringstream lines(outcome.out);
  for (std::string line; std::getline(lines, line);) {
    const Json record = Json::parse(line);
    EXPECT_EQ(record.at("wrong"), 0) << line;
    of_op[record.at("op")].push_back(record);
  }
  for (const char* op : {"combine", "pair"}) {
    const std::vector<Json>& records = of_op[op];
    ASSERT_EQ(records.size(), 3u) << op;
    EXPECT_FALSE(records[0].contains("late_us")) << records[0].dump();
    EXPECT_EQ(records[1].at("late_us"), 10);
    EXPECT_EQ(records[2].at("late_us"), kLate);
    EXPECT_GE(records[2].at("us_p50"), kLate) << "in every operation, also in each of a loop of pairs";
  }
  EXPECT_LT(of_op["pair"][0].at("us_p50"), of_op["pair"][2].at("us_p50"));
  const Outcome table = run(std::string("bench -n 1 -w 0 -b 4 -e 4 --op combine --late 10 ") + kSmall);
  EXPECT_EQ(table.code, 0) << table.err;
  EXPECT_THAT(table.out, HasSubstr("late"));
}

TEST_F(Cli, BenchTakesEveryKindOfProfile) {
  for (const char* profile : {"hot-rank:2", "drop:0.5", "ragged", "duplicates"}) {
    const Outcome outcome = run(std::string("bench -n 1 -w 0 -b 16 -e 16 --profile ") + profile + " " + kSmall);
    EXPECT_EQ(outcome.code, 0) << profile << outcome.out << outcome.err;
  }
}

TEST_F(Cli, MemoryOfARankIsWhatItsPlansSay) {
  for (const char* op : {"dispatch --tokens 512", "low_latency_dispatch --tokens 32"}) {
    const Outcome outcome = run(std::string("plan --measure --json --ranks 2 --op ") + op);
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    const Json line = Json::parse(outcome.out);
    const double measured = line.at("measured_bytes"), planned = line.at("planned_bytes");
    EXPECT_NEAR(measured / planned, 1, 0.05) << line.dump();
  }
}

TEST_F(Cli, ARankThatDiesGivesCodeThreeAndItsName) {
  // The limit of create is far below what any create takes.
  const Outcome outcome =
      run(std::string("run --tokens 8 --decode-steps 0 ") + kSmall, "ANYEP_STARTUP_TIMEOUT_S=0.000001");
  EXPECT_EQ(outcome.code, 3) << outcome.out << outcome.err;
  EXPECT_THAT(outcome.out + outcome.err, HasSubstr("rank "));
}

}  // namespace
